"""Weights in safetensors files: one file, or several files with an index."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.errors import ConfigError
from trainer.rundir.files import open_regular, read_json
from trainer.weights.source import Region, Source, copy_part

SUFFIX = ".safetensors"
MAX_INDEX_BYTES = 1 << 26
"""Largest size in bytes of an index."""


class SafetensorsFiles(Source):
    """Tensors of one or several safetensors files.

    A name that the metadata of a file maps to another tensor of the file is that tensor: `safetensors.torch.save_model`
    and `launch.export` store tied tensors so.

    Args:
        path: the file, or the folder of all files, for messages and `meta.json`.
        files: file by name of a tensor; None takes all tensors of the file `path`.

    Raises:
        ConfigError: A file is missing, is no safetensors file, or lacks a tensor.
    """

    kind = "safetensors"

    def __init__(self, path: Path, files: Mapping[str, Path] | None = None) -> None:
        self.path = path
        self.files: Sequence[Path] = sorted({*files.values()}) if files is not None else [path]
        self.facts = {}
        self.notes = []
        self.aliases: dict[str, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self._place: dict[str, tuple[Path, str]] = {}
        for file in self.files:
            self._list(file, None if files is None else {name for name in files if files[name] == file})

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        for file in self.files:
            here = {name: target for name, target in targets.items() if self._place[name][0] == file}
            if not here:
                continue
            with _opened(file) as opened:
                for name, target in here.items():
                    copy_part(name, target, partial(_read, file, opened, self._place[name][1]))

    def read(self, name: str, region: Region) -> Tensor:
        """Return a part of a tensor; the file is open only meanwhile, so that no read page stays in memory.

        Raises:
            ConfigError: The file cannot be read.
        """
        file, stored = self._place[name]
        with _opened(file) as opened:
            return _read(file, opened, stored, region)

    def _list(self, file: Path, wanted: set[str] | None) -> None:
        with _opened(file) as opened:
            stored = set(opened.keys())
            if wanted is not None and (lacking := sorted(wanted - stored)):
                raise ConfigError(f"{file} has no tensor {lacking[0]}, which the index lists in it")
            chosen = stored if wanted is None else wanted
            metadata = (opened.metadata() or {}).items()
            aliases = {name: kept for name, kept in metadata if kept in chosen and name not in stored}
            self.aliases |= aliases
            for name, kept in [*((name, name) for name in sorted(chosen)), *aliases.items()]:
                described = opened.get_slice(kept)
                if described.get_dtype() not in DTYPES:
                    raise ConfigError(
                        f"{file}: {kept} has the type {described.get_dtype()}, which a model cannot hold"
                    )
                dtype = DTYPES[described.get_dtype()]
                self.tensors[name] = torch.empty(described.get_shape(), dtype=dtype, device="meta")
                self._place[name] = (file, kept)


DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""Type of torch by its name in a safetensors header; types without one (float8 needs scales) are refused."""


def _read(file: Path, opened: Any, name: str, region: Region) -> Tensor:
    try:
        # A 0-dim tensor has no slices.
        values: Tensor = opened.get_slice(name)[region] if region else opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file}: {name} cannot be read: {error}") from error
    return values


def _opened(file: Path) -> Any:
    try:
        open_regular(file).close()  # a pipe would wait for ever
        return safe_open(file, framework="pt", device="cpu")
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ConfigError(f"{file} is no complete safetensors file: {error}") from error


def read_index(index: Path) -> dict[str, Path]:
    """Return the file of each tensor that an index lists; the files are beside the index.

    Raises:
        ConfigError: The index is no JSON of the form `{"weight_map": {name: file}}`, or names another folder.
    """
    try:
        content = read_json(index, MAX_INDEX_BYTES)
    except OSError as error:
        raise ConfigError(f"{index} cannot be read: {error.strerror}") from error
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise ConfigError(f"{index}: expected a weight_map from tensors to files")
    for file in files.values():
        if Path(file).name != file or not file.isprintable():
            raise ConfigError(f"{index} names {file!r:.100}, which is not a file beside it")
    return {name: index.parent / file for name, file in files.items()}
