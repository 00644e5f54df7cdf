"""Read the files of a committed checkpoint (`trainer.checkpoint.store`) without trusting them.

A hostile checkpoint must not run code. DCP would unpickle its index, so a restricted unpickler reads the index and
accepts only the classes of an index. An index with pickled objects is refused. Tensors are read with `weights_only`.
"""

import io
import math
import os
import pickle
import pickletools
import zlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as index_types
from torch.distributed.checkpoint.filesystem import _StorageInfo

from trainer.errors import ConfigError, message_of
from trainer.rundir.checkpoints import MARKER, SCALARS
from trainer.rundir.files import open_regular, read_json

INDEX = ".metadata"

MAX_INDEX_BYTES = 1 << 28
"""Largest size in bytes of an index."""
_READ_BYTES = 1 << 22


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used. The message begins with a path; the caller puts the config key in front."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose files were changed after they were written, or must not be trusted."""


class CheckpointMisfit(CheckpointError):
    """A complete checkpoint whose tensors differ from the requested ones.

    Args:
        message: message of the error.
        tensor: name in the checkpoint of the tensor that does not fit.
        is_dtype: whether the dtype of the tensor is wrong and its shape is right.
    """

    def __init__(self, message: str, tensor: str = "", is_dtype: bool = False) -> None:
        super().__init__(message)
        self.tensor = tensor
        self.is_dtype = is_dtype


def digest(path: Path) -> dict[str, int]:
    """Return size and CRC-32 of a file. CRC-32 detects damage, not malice, twice as fast as SHA-256."""
    size = crc = 0
    with open_regular(path) as file:
        while block := file.read(_READ_BYTES):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return {"bytes": size, "crc32": crc}


def damaged(path: Path, name: str, what: str) -> DamagedCheckpoint:
    """Return the error for a damaged file of a checkpoint."""
    return DamagedCheckpoint(f"{path / name} {what}")


def unreadable(path: Path, name: str, error: OSError) -> CheckpointError:
    """Return the error for a file that could not be read; only a missing file counts as damage."""
    if isinstance(error, FileNotFoundError):
        return damaged(path, name, "is missing")
    return CheckpointError(f"{path / name} cannot be read ({error.strerror or error})")


def read_values(path: Path, name: str) -> dict[str, Any]:
    """Return the content of a JSON file of a checkpoint.

    Raises:
        CheckpointError: The file is missing, is no small regular file, is no JSON object, or could not be read.
    """
    try:
        values = read_json(path / name)
    except OSError as error:
        raise unreadable(path, name, error) from error
    except ConfigError as error:
        raise DamagedCheckpoint(str(error)) from error
    if not isinstance(values, dict):
        raise damaged(path, name, "is not a JSON object")
    return values


def read_marker(path: Path) -> dict[str, dict[str, int]]:
    """Return size and CRC-32 of each file that the marker of a checkpoint lists.

    Raises:
        CheckpointError: The marker is missing or invalid.
    """
    if not os.path.lexists(path / MARKER):
        raise CheckpointError(f"{path} is no committed checkpoint: it has no {MARKER}")
    content = read_values(path, MARKER)
    try:
        files = {
            str(name): {what: int(entry[what]) for what in ("bytes", "crc32")}
            for name, entry in content["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise damaged(path, MARKER, f"cannot be read ({error})") from error
    for name in (INDEX, SCALARS):
        if name not in files:
            raise damaged(path, MARKER, f"does not list {name}")
    for name in files:
        if Path(name).name != name:
            raise damaged(path, MARKER, f"lists {name}, which is outside the checkpoint")
    return files


def check_files(path: Path, names: Iterable[str], expected: Mapping[str, Mapping[str, int]]) -> None:
    """Compare files of a checkpoint with the entries of its marker.

    Raises:
        DamagedCheckpoint: A file is missing, of another size or damaged; names the first one.
        CheckpointError: A file could not be read; names it.
    """
    for name in names:
        file = path / name
        try:
            size = file.stat().st_size
            actual = digest(file) if size == expected[name]["bytes"] else None
        except OSError as error:
            raise unreadable(path, name, error) from error
        except ConfigError as error:
            raise DamagedCheckpoint(str(error)) from error
        if actual is None:
            raise damaged(path, name, f"has {size} bytes, not {expected[name]['bytes']}")
        if actual["crc32"] != expected[name]["crc32"]:
            raise damaged(path, name, "is damaged (its checksum is not the marker's)")


def read_index(path: Path) -> index_types.Metadata:
    """Read the index of a checkpoint, which DCP needs to read tensors.

    Raises:
        CheckpointError: The index cannot be read, lists objects other than tensors, or refers to a file outside the
            checkpoint.
    """
    files = read_marker(path)
    try:
        with open_regular(path / INDEX) as file:
            status = os.fstat(file.fileno())
        if status.st_size != files[INDEX]["bytes"] or status.st_size > MAX_INDEX_BYTES:
            raise ValueError(f"it has {status.st_size} bytes, and {MARKER} lists {files[INDEX]['bytes']}")
        index = _parsed(path / INDEX, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
        tensors_only = len(tensor_entries(index)) == len(index.state_dict_metadata)
        inside = all(
            info.relative_path in files and not info.transform_descriptors
            for info in index.storage_data.values()
        )
    except OSError as error:
        raise unreadable(path, INDEX, error) from error
    except Exception as error:  # a damaged pickle may raise anything
        raise damaged(path, INDEX, f"cannot be read ({message_of(error)})") from error
    if not tensors_only:
        raise damaged(path, INDEX, "lists pickled objects; only tensors are loaded")
    if not inside:
        raise damaged(path, INDEX, f"names a file that {MARKER} does not list")
    return index


@lru_cache(maxsize=4)
def _parsed(path: Path, version: tuple[int, ...]) -> Any:
    """Return the checked index in a file, not to be changed; `version` differs after a change of the file."""
    with open_regular(path) as file:
        data = file.read(MAX_INDEX_BYTES)
    _check_opcodes(data)
    index = _IndexUnpickler(io.BytesIO(data)).load()
    _check_types(index)
    return index


def _check_types(index: Any) -> None:
    """Check the types that DCP relies on, and that the files hold as many bytes as the tensors have."""
    _check(index, index_types.Metadata, "the index")
    stored: dict[str, int] = {}
    for place, info in index.storage_data.items():
        _check(place, index_types.MetadataIndex, "a place")
        _check(info, _StorageInfo, place.fqn)
        _check(info.relative_path, str, place.fqn)
        for number in (info.offset, info.length):
            _check(number, int, place.fqn)
        stored[place.fqn] = stored.get(place.fqn, 0) + info.length
    for name, entry in tensor_entries(index).items():
        _check(name, str, "a name")
        _check(entry.properties.dtype, torch.dtype, name)
        for size in (entry.size, *(size for chunk in entry.chunks for size in (chunk.offsets, chunk.sizes))):
            _check(size, torch.Size, name)
        _check_chunks(name, entry)
        if entry.size.numel() * entry.properties.dtype.itemsize > stored.get(name, 0):
            raise ValueError(f"{name} is larger than its bytes in the files")


def _check_chunks(name: str, entry: index_types.TensorStorageMetadata) -> None:
    """Check that the chunks of a tensor are a grid that covers it, so that no element stays unread."""
    shape = tuple(entry.size)
    chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks if 0 not in chunk.sizes]
    if 0 in shape and not chunks:
        return
    counts = []
    for dim, length in enumerate(shape):
        end = 0
        spans = sorted({(offsets[dim], sizes[dim]) for offsets, sizes in chunks})
        for start, size in spans:
            if start != end:
                raise ValueError(f"the chunks of {name} overlap or leave a gap")
            end = start + size
        if end != length:
            raise ValueError(f"the chunks of {name} do not have its size")
        counts.append(len(spans))
    if len(chunks) != len(set(chunks)) or len(chunks) != math.prod(counts):
        raise ValueError(f"the chunks of {name} overlap or leave a gap")


def _check(value: Any, kind: type, what: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{what} has a {type(value).__name__} for a {kind.__name__}")


def tensor_entries(index: index_types.Metadata) -> dict[str, index_types.TensorStorageMetadata]:
    """Return the tensor entries of an index by name."""
    entries = index.state_dict_metadata.items()
    return {key: entry for key, entry in entries if isinstance(entry, index_types.TensorStorageMetadata)}


_FRAME, _STOP = pickle.FRAME[0], pickle.STOP[0]
_COUNTED = {
    pickletools.TAKEN_FROM_ARGUMENT1: -2,
    pickletools.TAKEN_FROM_ARGUMENT4U: -5,
    pickletools.TAKEN_FROM_ARGUMENT8U: -9,
}
_EXCLUDED = (
    *("FRAME", "STOP", "PUT", "BINPUT", "LONG_BINPUT"),
    *("BINPERSID", "EXT1", "EXT2", "EXT4", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER"),
)
_STEPS = [0] * 256
"""Bytes of each opcode with its argument; -n if the first n of them also give the number of the others.

0 means that DCP's pickles do not have it since Python 3.8, such as opcodes that end with a line or have a signed
length. Those of a frame and of the end are 0 too.
"""
for _code in pickletools.opcodes:
    _size = 0 if _code.arg is None else _code.arg.n
    if _code.name not in _EXCLUDED:
        _STEPS[ord(_code.code)] = 1 + _size if _size >= 0 else _COUNTED.get(_size, 0)


def _check_opcodes(data: bytes) -> None:
    """Check all opcodes up to the last one. Takes a quarter of the time of `pickletools.genops`.

    Python reads the argument of an opcode that crosses the end of a frame from behind the frame. Such an opcode is
    refused, since what follows it is not what is checked here.

    Raises:
        UnpicklingError: The pickle is cut off, or has an opcode that DCP's pickles do not have. Above all it must not
            number its objects itself: Python would allocate memory for all numbers up to the largest one.
    """
    place, frame, total, steps = 0, 0, len(data), _STEPS  # local names, since this loop takes the time
    while place < total:
        step = steps[data[place]]
        if step > 0:
            end = place + step
        elif step < 0:
            end = place - step + int.from_bytes(data[place + 1 : place - step], "little")
        elif data[place] == _STOP:
            return
        elif data[place] == _FRAME and place >= frame:
            end = place + 9
            frame = end + int.from_bytes(data[place + 1 : end], "little")
        else:
            raise pickle.UnpicklingError(f"the opcode {chr(data[place])!r} is not allowed in it")
        if end > frame > place:
            raise pickle.UnpicklingError(f"the opcode {chr(data[place])!r} crosses the end of a frame")
        place = end
    raise pickle.UnpicklingError("it is cut off")


class _IndexUnpickler(pickle.Unpickler):
    """Unpickler that accepts only the classes of DCP's index of tensors; building them runs no code."""

    _allowed = frozenset(
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
        if (module, name) in self._allowed:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return {"torch.strided": torch.strided}.__getitem__
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")


class Reader(dcp.FileSystemReader):
    """DCP's reader with an index that is read and checked already."""

    def __init__(self, path: Path, index: index_types.Metadata) -> None:
        super().__init__(path)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> index_types.Metadata:
        return self._index
