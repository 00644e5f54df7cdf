"""Where an export goes: a safetensors file, several with their index, or a folder, there whole or not at all."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import ConfigError
from trainer.rundir.files import sync_directory

SUFFIX = ".safetensors"
OTHER_FORMATS = (".bin", ".ckpt", ".pt", ".pth")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Destination:
    """What `out=` names: `FILE.safetensors`, or a folder."""

    path: Path

    def __str__(self) -> str:
        # A folder's slash keeps from_pretrained from taking its name for that of a model to download.
        return f"{self.path}/" if self.is_folder else str(self.path)

    @property
    def is_folder(self) -> bool:
        """Whether a folder is to be made."""
        return self.path.suffix != SUFFIX

    def stem(self, in_folder: str) -> str:
        """The file's name without its suffix; a folder's file is called `in_folder`."""
        return in_folder if self.is_folder else self.path.stem

    def require_free(self, names: Mapping[str, object] | None = None) -> None:
        """Refuse to write over anything.

        Args:
            names: of the files that will be written beside `path`, once they are known.

        Raises:
            ConfigError: naming what exists, or the parent that does not.
        """
        beside = () if self.is_folder else map(self.path.with_name, names or ())
        for path in (self.path, *beside):
            if os.path.lexists(path):
                raise ConfigError(f"out: {path} exists already; nothing is overwritten")
        if not self.path.parent.is_dir():
            raise ConfigError(f"out: there is no folder {self.path.parent} to put {self.path.name} into")

    @contextmanager
    def written_aside(self) -> Iterator[Path]:
        """A hidden folder beside `path` to write into; what is in it takes its place at the end.

        After an exception nothing is left.

        Raises:
            ConfigError: it cannot be made, or something took the place meanwhile.
        """
        aside = self.path.with_name(f".{self.path.name}.{secrets.token_hex(3)}.tmp")
        try:
            aside.mkdir()
        except OSError as error:
            raise ConfigError(f"out: {self.path} cannot be written: {error.strerror}") from error
        try:
            yield aside
            try:
                self._put_in_place(aside)
            except OSError as error:
                raise ConfigError(f"out: {self.path} cannot be written: {error}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _put_in_place(self, aside: Path) -> None:
        # The index last: without it the other files are no export.
        files = sorted(aside.iterdir(), key=lambda file: (file.suffix != SUFFIX, file.name))
        self.require_free(dict.fromkeys(file.name for file in files))
        readable = aside.stat().st_mode & 0o666
        for file in files:
            file.chmod(readable)  # safetensors makes them for their owner alone
            with file.open("rb") as written:
                os.fsync(written.fileno())
        sync_directory(aside)
        if self.is_folder:
            aside.rename(self.path)
        else:
            placed: list[Path] = []
            try:
                for file in files:
                    placed.append(self.path.with_name(file.name))
                    file.rename(placed[-1])
            except BaseException:
                for file in placed:
                    file.unlink(missing_ok=True)
                raise
        sync_directory(self.path.parent)


def parse_out(text: str) -> Destination:
    """`out=`.

    Raises:
        ConfigError: it names nothing, or a file of another format.
    """
    path = Path(text)
    if not text or path.name in ("", "..") or (path.suffix in OTHER_FORMATS and not text.endswith("/")):
        raise ConfigError(f"out: expected FILE{SUFFIX} or FOLDER/, got {text or 'nothing'}")
    if text.endswith("/") and path.suffix == SUFFIX:
        raise ConfigError(f"out: expected FILE{SUFFIX} or FOLDER/, got {text}, which looks like both")
    return Destination(path)


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MiB` or `1000000`.

    Raises:
        ConfigError: it is no size above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise ConfigError(f"max_shard_size: expected a size such as 5GB or 500MB, got {text or 'nothing'}")
    return size


def split(sizes: Mapping[str, int], stem: str, max_bytes: int) -> dict[str, list[str]]:
    """Share tensors out to files in their order, by the names that Hugging Face's libraries look for.

    Args:
        sizes: bytes by name of the tensor.
        stem: of the files' names.
        max_bytes: of one file; a tensor that is larger has a file of its own.

    Returns:
        Names of the tensors by name of the file: `<stem>.safetensors`, or `<stem>-00001-of-0000N.safetensors`.
    """
    parts: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if parts[-1] and filled + size > max_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    if len(parts) == 1:
        return {f"{stem}{SUFFIX}": parts[0]}
    return {
        f"{stem}-{number:05d}-of-{len(parts):05d}{SUFFIX}": names for number, names in enumerate(parts, 1)
    }


def index_name(stem: str) -> str:
    """Name of the file that says which tensor is in which file."""
    return f"{stem}{SUFFIX}.index.json"


def index_text(files: Mapping[str, list[str]], total_bytes: int) -> str:
    """That file's content, in the form of Hugging Face's libraries."""
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
