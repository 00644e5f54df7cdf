"""The files of a committed checkpoint, and how they are read without trusting them.

`COMMIT.json` lists every file with its size and CRC-32. A folder without it is no checkpoint. The CRC detects damage. A
hostile checkpoint runs no code: DCP would unpickle its index, so the index is read by an unpickler that accepts only
the classes of an index; an index with pickled objects is refused, and tensors are read with `weights_only`.
"""

import json
import pickle
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as index_types
from torch.distributed.checkpoint.filesystem import _StorageInfo

from trainer.errors import ConfigError

MARKER = "COMMIT.json"
SCALARS = "state.json"
INDEX = ".metadata"
FOLDER = re.compile(r"step-(\d{8,})(\.tmp)?")

_READ_BYTES = 1 << 22


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used. The message begins with a path; the caller adds the key that named it."""


class DamagedCheckpoint(CheckpointError):
    """It is not as it was written, or not to be trusted."""


class CheckpointMisfit(CheckpointError):
    """The checkpoint is complete, but does not hold the requested tensors.

    Args:
        message: as of every CheckpointError.
        tensor: name in the checkpoint of the one that does not fit.
        is_dtype: its shape fits, and its dtype does not.
    """

    def __init__(self, message: str, tensor: str = "", is_dtype: bool = False) -> None:
        super().__init__(message)
        self.tensor = tensor
        self.is_dtype = is_dtype


def committed(folder: Path) -> list[Path]:
    """The committed checkpoints in a folder, by step."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = FOLDER.fullmatch(path.name)
        if match and not match[2] and (path / MARKER).is_file():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def digests(paths: Iterable[Path]) -> dict[str, dict[str, int]]:
    """Size and CRC-32 by file name. CRC: it guards against damage, not malice, at twice the speed of SHA-256."""
    found = {}
    for path in paths:
        size = crc = 0
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                size += len(block)
                crc = zlib.crc32(block, crc)
        found[path.name] = {"bytes": size, "crc32": crc}
    return found


def damaged(path: Path, name: str, what: str) -> DamagedCheckpoint:
    """The error to raise about a file of a checkpoint."""
    return DamagedCheckpoint(f"{path / name} {what}")


def unreadable(path: Path, name: str, error: OSError) -> CheckpointError:
    """The error to raise about a file that was not read. Damage only if it is not there: all else may pass."""
    if isinstance(error, FileNotFoundError):
        return damaged(path, name, "is missing")
    return CheckpointError(f"{path / name} cannot be read ({error.strerror or error})")


def read_marker(path: Path) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of each file of a checkpoint.

    Raises:
        CheckpointError: there is no marker, or it cannot be right.
    """
    try:
        listed = json.loads((path / MARKER).read_text(encoding="utf-8"))["files"]
        files = {
            str(name): {what: int(entry[what]) for what in ("bytes", "crc32")}
            for name, entry in listed.items()
        }
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no committed checkpoint: it has no {MARKER}") from None
    except OSError as error:
        raise unreadable(path, MARKER, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, MARKER, f"cannot be read ({error})") from error
    for name in (INDEX, SCALARS):
        if name not in files:
            raise damaged(path, MARKER, f"does not list {name}")
    for name in files:
        if Path(name).name != name:
            raise damaged(path, MARKER, f"lists {name}, which is outside the checkpoint")
    return files


def check_files(path: Path, names: Iterable[str], expected: Mapping[str, Mapping[str, int]]) -> None:
    """Compare the named files with the marker's entries.

    Raises:
        DamagedCheckpoint: naming the first file that is missing, of another size or damaged.
        CheckpointError: naming one that could not be read.
    """
    for name in names:
        file = path / name
        try:
            size = file.stat().st_size
            found = digests([file])[name] if size == expected[name]["bytes"] else None
        except OSError as error:
            raise unreadable(path, name, error) from error
        if found is None:
            raise damaged(path, name, f"has {size} bytes, not {expected[name]['bytes']}")
        if found["crc32"] != expected[name]["crc32"]:
            raise damaged(path, name, "is damaged (its checksum is not the marker's)")


def read_index(path: Path) -> index_types.Metadata:
    """What DCP needs to know to read the tensors of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, holds anything but tensors, or points outside the checkpoint.
    """
    files = read_marker(path)
    try:
        with (path / INDEX).open("rb") as file:
            index = _IndexUnpickler(file).load()
        tensors_only = len(tensor_entries(index)) == len(index.state_dict_metadata)
        inside = all(
            info.relative_path in files and not info.transform_descriptors
            for info in index.storage_data.values()
        )
    except OSError as error:
        raise unreadable(path, INDEX, error) from error
    except Exception as error:  # a damaged pickle may raise anything
        raise damaged(path, INDEX, f"cannot be read ({error})") from error
    if not tensors_only:
        raise damaged(path, INDEX, "announces pickled objects, and only tensors are loaded")
    if not inside:
        raise damaged(path, INDEX, f"names a file that {MARKER} does not list")
    return index


def tensor_entries(index: index_types.Metadata) -> dict[str, index_types.TensorStorageMetadata]:
    """The entries of an index that are tensors, by name."""
    entries = index.state_dict_metadata.items()
    return {key: entry for key, entry in entries if isinstance(entry, index_types.TensorStorageMetadata)}


class _IndexUnpickler(pickle.Unpickler):
    """Knows the classes that DCP's index of tensors is made of. They hold data; none runs code when it is built."""

    _known = frozenset(
        (kind.__module__, kind.__name__)
        for kind in (
            index_types.Metadata,
            index_types.TensorStorageMetadata,
            index_types.BytesStorageMetadata,
            index_types.ChunkStorageMetadata,
            index_types.TensorProperties,
            index_types._MEM_FORMAT_ENCODING,
            index_types.MetadataIndex,
            index_types.StorageMeta,
            _StorageInfo,
            torch.Size,
        )
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._known:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return {"torch.strided": torch.strided}.__getitem__
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in it")


class Reader(dcp.FileSystemReader):
    """DCP's reader on an index that was read and checked already."""

    def __init__(self, path: Path, index: index_types.Metadata) -> None:
        super().__init__(path)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> index_types.Metadata:
        return self._index


class Writer(dcp.FileSystemWriter):
    """DCP's writer, without the machine's path in the index: a run directory may be moved."""

    def storage_meta(self) -> index_types.StorageMeta:
        return index_types.StorageMeta(save_id=self.save_id)
