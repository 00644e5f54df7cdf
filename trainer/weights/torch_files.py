"""Weights in files of `torch.save`, read with `weights_only=True`, so that no code of a file runs."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.errors import ConfigError, listed, message_of
from trainer.rundir.files import open_regular
from trainer.weights.source import Region, Source, copy_part

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
"""Suffixes of the files that `torch.save` writes."""


class TorchFiles(Source):
    """Tensors of one or several files of `torch.save`, mapped into memory, so that a rank reads only its own part.

    A file is a state dict (a mapping of names to tensors), or a mapping with state dicts among its values, such as
    `{"state_dict": ..., "epoch": 3}`. Of several, the user names one.

    Args:
        path: the file, or the folder of all files, for messages and `meta.json`.
        files: files to read.
        entry: key of the state dict in each file; None takes the file itself or its only state dict.

    Raises:
        ConfigError: A file cannot be read safely, or which of its state dicts is meant is unclear.
    """

    kind = "torch"

    def __init__(self, path: Path, files: list[Path], entry: str | None = None) -> None:
        self.path = path
        self.files = files
        self.facts = {} if entry is None else {"entry": entry}
        self.notes: list[str] = []
        self.aliases = {}
        self._stored: dict[str, Tensor] = {}
        for file in files:
            self._stored |= _state_dict(file, self._load(file), entry)
        self.tensors = {name: tensor.to("meta") for name, tensor in self._stored.items()}

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        for name, target in targets.items():
            copy_part(name, target, self._stored[name].__getitem__)

    def read(self, name: str, region: Region) -> Tensor:
        """Return a part of a tensor, a view of the mapped file."""
        return self._stored[name][region]

    def _load(self, file: Path) -> Any:
        try:
            with open_regular(file) as opened:
                is_zip = opened.read(4) == b"PK\x03\x04"
            if not is_zip:
                self.notes.append(f"{file} has the format of torch before 1.6: every rank reads all of it")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
        except FileNotFoundError:
            raise ConfigError(f"{file} does not exist") from None
        except ConfigError:
            raise
        except pickle.UnpicklingError as error:
            raise ConfigError(
                f"{file} has objects other than tensors, which could run code; save its state dict alone,"
                f" or as safetensors ({_refused(error)})"
            ) from error
        except Exception as error:  # a damaged file may raise anything
            raise ConfigError(
                f"{file} cannot be read: {type(error).__name__}: {message_of(error)}"
            ) from error


def _refused(error: Exception) -> str:
    """Return the line of torch's long message that names the refused object."""
    lines = [line.strip() for line in str(error).splitlines()]
    named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (named or lines or [""])[0].partition("WeightsUnpickler error: ")[2][:200] or "weights_only=True"


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def _state_dict(file: Path, content: Any, entry: str | None) -> Mapping[str, Tensor]:
    inner = content if isinstance(content, Mapping) else {}
    nested = {str(key): value for key, value in inner.items() if _is_state_dict(value)}
    if entry is not None:
        if entry not in nested:
            raise ConfigError(
                f"{file} has no state dict {entry!r}; it has {listed([*nested]) or 'none below its top level'}"
            )
        found = nested[entry]
    elif _is_state_dict(content):
        found = content
    elif len(nested) == 1:
        (found,) = nested.values()
    elif nested:
        raise ConfigError(
            f"{file} has several state dicts: {listed([*nested])}; choose one: {file}:{next(iter(nested))}"
        )
    else:
        raise ConfigError(f"{file} has no state dict, a mapping of names to tensors")
    for name, tensor in found.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ConfigError(f"{file}: {name} is no dense tensor")
    return {name: tensor.detach() for name, tensor in found.items()}
