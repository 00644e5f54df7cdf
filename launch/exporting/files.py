"""Output of an export: one safetensors file, several files with an index, or a folder.

The files are written into a temporary folder and moved to their final place at the end. A failed export leaves no
file behind.
"""

import json
import os
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launch.sweeps.signals import temporary_folder
from trainer.errors import ConfigError
from trainer.rundir.files import looks_like_file, sync_directory

SUFFIX = ".safetensors"
OTHER_FORMATS = (".bin", ".ckpt", ".gguf", ".h5", ".json", ".msgpack", ".npz", ".onnx", ".pkl", ".pt", ".pth")
"""Suffixes of other files, which `out=` refuses."""
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
"""Units of `max_shard_size=` in bytes."""


@dataclass(frozen=True)
class Destination:
    """Path in `out=`: a new file `FILE.safetensors` or a new folder."""

    path: Path
    key: str = "out"
    """Argument of the command line that has the path, for messages."""

    def __str__(self) -> str:
        # With the slash at the end, from_pretrained cannot mistake the path for the name of a model to download.
        return f"{self.path}/" if self.is_folder else str(self.path)

    @property
    def is_folder(self) -> bool:
        """Whether the export is a folder."""
        return self.path.suffix != SUFFIX

    def stem(self, in_folder: str) -> str:
        """Return the file name without suffix; in a folder, the name is `in_folder`."""
        return in_folder if self.is_folder else self.path.stem

    def require_free(self, names: Iterable[str] = ()) -> None:
        """Check that no file of the export exists yet and that the parent folder exists.

        `names` are those of the files of a split export, which are written beside `path`.

        Raises:
            ConfigError: A file of the export exists, or the parent folder does not.
        """
        beside = () if self.is_folder else map(self.path.with_name, names)
        for path in (self.path, *beside):
            if os.path.lexists(path):
                raise ConfigError(f"{self.key}: {path} exists already; files are never overwritten")
        if not self.path.parent.is_dir():
            raise ConfigError(
                f"{self.key}: the folder {self.path.parent} for {self.path.name} does not exist"
            )

    @contextmanager
    def written_aside(self) -> Iterator[Path]:
        """Make a temporary folder beside `path` for the context; move its files to `path` at the end.

        After an exception, SIGTERM or SIGHUP, the temporary folder and all its files are removed.

        Raises:
            ConfigError: The folder cannot be made or moved, or a file of the export exists by now.
        """
        aside = self.path.with_name(f".{self.path.name}.{secrets.token_hex(3)}.tmp")
        with temporary_folder(aside, f"{self.key}: {self.path}"):
            yield aside
            try:
                self._put_in_place(aside)
            except OSError as error:
                raise ConfigError(f"{self.key}: {self.path} cannot be written: {error}") from error

    def _put_in_place(self, aside: Path) -> None:
        # The index is last: readers start with it, so it appears only when all other files are there.
        files = sorted(aside.iterdir(), key=lambda file: (file.suffix != SUFFIX, file.name))
        self.require_free(file.name for file in files)
        readable = aside.stat().st_mode & 0o666
        for file in files:
            file.chmod(readable)  # safetensors makes files that only their owner can read
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


def parse_out(text: str, key: str = "out", *, folders: bool = True) -> Destination:
    """Return the parsed value of `out=` or another key, which may be a folder only with `folders`.

    Raises:
        ConfigError: The value is no name for a new file or folder, has the suffix of another format, or a mistyped one.
    """
    path = Path(text)
    if not folders and (path.suffix != SUFFIX or text.endswith("/")):
        raise ConfigError(f"{key}: expected FILE{SUFFIX}, got {text or 'nothing'}")
    is_other = path.suffix != SUFFIX and looks_like_file(text, (SUFFIX, *OTHER_FORMATS))
    if not text or path.name in ("", "..") or is_other:
        raise ConfigError(f"{key}: expected FILE{SUFFIX} or FOLDER/, got {text or 'nothing'}")
    if text.endswith("/") and path.suffix == SUFFIX:
        raise ConfigError(f"{key}: expected FILE{SUFFIX} or FOLDER/, got {text}, which looks like both")
    return Destination(path, key)


def parse_size(text: str) -> int:
    """Return the number of bytes in the value of `max_shard_size=`, such as `5GB`, `500MiB` or `1000000`.

    Raises:
        ConfigError: The value is no size, or is less than 1 byte.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise ConfigError(
            f"max_shard_size: expected a size such as 5GB or 500MB, got {text[:300] or 'nothing'}"
        )
    return size


def split(sizes: Mapping[str, int], stem: str, max_bytes: int) -> dict[str, list[str]]:
    """Assign the tensors, in order, to files that are named as Hugging Face's libraries expect.

    Args:
        sizes: Bytes of each tensor, by its name.
        stem: Beginning of the file names.
        max_bytes: Largest size of a file in bytes; a larger tensor gets a file of its own.

    Returns:
        Names of the tensors in each file, by file name: `<stem>.safetensors` or `<stem>-00001-of-0000N.safetensors`.
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


def written_line(out: Destination, sizes: Mapping[str, int], files: Collection[str], more: str = "") -> str:
    """Return the line for the user on the tensors and files that were written, with further text on the tensors."""
    several = f" in {len(files)} files" if len(files) > 1 else ""
    return f"written: {out} ({len(sizes)} tensors, {sum(sizes.values()):,} bytes{several}{more})"


def index_name(stem: str) -> str:
    """Return the name of the index: the file that maps each tensor to its file."""
    return f"{stem}{SUFFIX}.index.json"


def index_text(files: Mapping[str, list[str]], total_bytes: int) -> str:
    """Return the content of the index in the format of Hugging Face's libraries, from names of tensors by file name."""
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
