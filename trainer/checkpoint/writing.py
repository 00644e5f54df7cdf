"""Write a checkpoint on all ranks: first its files aside, then its marker.

`prepare` runs between two steps. `write` may run in a thread beside the training: it uses no collective of the default
group if it gets a group of its own.
"""

import errno
import io
import json
import os
import zlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import metadata as index_types
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor
from torch.utils import serialization

from trainer.checkpoint.format import digest
from trainer.checkpoint.places import clear_way
from trainer.checkpoint.store import first_failure, split
from trainer.distributed.processes import agreeing, gather, on_main, own_rank
from trainer.rundir.checkpoints import MARKER, SCALARS
from trainer.rundir.files import sync_directory, write_atomically
from trainer.rundir.same_place import SamePlace

_SMALL_BYTES = 1 << 16
"""Size in bytes of a write from which it is not collected with others."""


@dataclass(frozen=True)
class Prepared:
    """A checkpoint whose content is checked and whose temporary folder is made."""

    path: Path
    """The folder of the committed checkpoint."""
    aside: Path
    """The temporary folder."""
    is_new: bool
    """False if a checkpoint of this step is committed already, so that there is nothing to write."""
    tensors: dict[str, Tensor]
    """Tensors and DTensors to store, by `/`-joined names."""
    scalars: str
    """The other values as JSON."""
    marker: dict[str, Any]
    """What the marker gets besides the files."""


def prepare(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    session: Mapping[str, Any] | None,
    warn: Callable[[str], object],
) -> Prepared:
    """Check what is saved on all ranks, and make the temporary folder. Nothing is copied.

    Every rank must call this with the same names. An error on any rank is raised on all of them.

    Args:
        folder: folder of all checkpoints of the run, made if missing in its own folder. Only its entries `step-*` are
            changed.
        step: optimizer steps done. If a checkpoint of this step exists, nothing is written.
        state: nested mappings with string keys. Leaves are tensors, DTensors or JSON values (tuples are loaded as
            lists); plain tensors and JSON values of the first rank are stored.
        session: JSON values to store in the marker (see `trainer.checkpoint.continuity`); those of rank 0 are stored.
        warn: function that shows a warning about the folder, called on rank 0: something had a checkpoint's name.

    Raises:
        ValueError: Two leaves share a name, or ranks differ in the names, shapes or dtypes of tensors.
        TypeError: A key is no string, or a leaf is neither a tensor nor a JSON value.
        OSError: The folder cannot be made; earlier checkpoints are unchanged.

    Collectives: two object gathers and an object broadcast on the default group.
    """
    tensors: dict[str, Tensor] = {}
    with agreeing("checking what is saved", Exception):
        scalars = _json(split(state, tensors))
    _check_same_on_all_ranks(tensors)
    path = folder / f"step-{step:08d}"
    marker = {"step": step, **({"session": session} if session else {})}
    aside = path.with_name(f"{path.name}.tmp")

    def make_way() -> bool:
        if not path.is_symlink() and (path / MARKER).is_file():
            return False
        for warning in clear_way(path, aside):
            warn(warning)
        return True

    is_new = on_main(make_way, "making the checkpoint's folder")
    return Prepared(path, aside, is_new, tensors, scalars, marker)


def write(
    prepared: Prepared,
    tensors: Mapping[str, Tensor],
    group: dist.ProcessGroup | None = None,
    place: SamePlace | None = None,
) -> None:
    """Write the files of a prepared checkpoint, each with one pass for its checksum, and commit it.

    Args:
        prepared: result of `prepare`.
        tensors: the tensors of `prepared`, or copies of them.
        group: process group of all ranks that no other thread uses; None uses the default group.
        place: the run directory as it was at the start, on rank 0; None does not compare it.

    Raises:
        OSError: A file could not be written; raised on every rank.
        NotSaved: The run directory was moved or deleted; raised on every rank.

    Collectives: those of DCP and two object gathers on `group`.
    """
    sums = _write(prepared.aside, tensors, group)
    files = {name: entry for part in gather(sums, group) for name, entry in part.items()}
    with agreeing("committing the checkpoint", Exception, group=group):
        if place is not None:
            place.check()
        if own_rank() == 0:
            _commit(prepared, files)


def _write(
    aside: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None
) -> dict[str, dict[str, int]]:
    """Write the tensors of this rank; return size and CRC-32 of the files that this rank wrote, by name."""
    writer = Writer(aside, on_host=not any(tensor.is_cuda for tensor in tensors.values()))
    try:
        # torch computes no CRC-32 of its own, because the marker has one of each whole file.
        with first_failure(), serialization.config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
            planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            dcp.save(dict(tensors), storage_writer=writer, planner=planner, process_group=group)
    except RuntimeError as error:
        # If the disk fills up within a tensor, torch's archive writer raises a RuntimeError that names its own file.
        if "inline_container" not in str(error):
            raise
        raise OSError(errno.EIO, f"a file of {aside.name} could not be finished (disk full?)") from error
    return writer.sums


def _commit(prepared: Prepared, files: Mapping[str, Any]) -> None:
    path, aside = prepared.path, prepared.aside
    write_atomically(aside / SCALARS, prepared.scalars, make_folder=False)
    files = {**files, SCALARS: digest(aside / SCALARS)}
    sync_directory(aside)
    aside.rename(path)
    sync_directory(path.parent)
    marker = json.dumps({**prepared.marker, "files": files}, indent=1) + "\n"
    write_atomically(path / MARKER, marker, make_folder=False)


def _json(scalars: Mapping[str, Any], prefix: str = "") -> str:
    for name, value in scalars.items():
        if isinstance(value, Mapping):
            _json(value, f"{prefix}{name}/")
            continue
        try:
            json.dumps(value)
        except TypeError as error:
            kind = type(value).__name__
            raise TypeError(
                f"checkpoint: {prefix}{name} is a {kind}; expected a tensor or a JSON value"
            ) from error
    return json.dumps(scalars)


def _check_same_on_all_ranks(tensors: Mapping[str, Tensor]) -> None:
    # DCP would silently store one rank's shard of a plain tensor; different shapes reveal such a shard.
    layout = {key: (tuple(t.shape), str(t.dtype), isinstance(t, DTensor)) for key, t in tensors.items()}
    digest = zlib.crc32(repr(sorted(layout.items())).encode())
    if len(set(gather(digest))) == 1:
        return
    first, *others = gather(layout)
    key = min(
        key for other in others for key in first.keys() | other.keys() if first.get(key) != other.get(key)
    )
    raise ValueError(
        f"checkpoint: ranks differ in {key}; expected the same shape and dtype on all (shards as DTensor)"
    )


class Writer(dcp.FileSystemWriter):
    """DCP's writer that takes the checksum of each file while it writes.

    Its index has no absolute paths, so that a run directory can be moved.
    """

    def __init__(self, path: Path, *, on_host: bool) -> None:
        super().__init__(path)
        # Else DCP, which copies tensors of a GPU ahead, would wait for the current stream of a GPU.
        if on_host:
            self.per_thread_copy_ahead = 0
        self.sums: dict[str, dict[str, int]] = {}
        """Size and CRC-32 of each file that this rank wrote, by name."""
        self.fs = _SummingFiles(self.sums)

    def storage_meta(self) -> index_types.StorageMeta:
        return index_types.StorageMeta(save_id=self.save_id)


class _SummingFiles(FileSystem):
    """Files that are written from start to end, each with its size and CRC-32.

    No folder is made: if the run directory is moved during a save, nothing is made in its place.
    """

    def __init__(self, sums: dict[str, dict[str, int]]) -> None:
        self._sums = sums

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        file = _SummedFile(path, mode)
        with _Collected(file, _SMALL_BYTES) as stream:
            yield stream
        self._sums[Path(path).name] = {"bytes": file.size, "crc32": file.crc32}

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Do nothing."""

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self._sums[Path(new_path).name] = self._sums.pop(Path(path).name)


class _SummedFile(io.FileIO):
    """A file whose size and checksum are taken from the bytes on their way."""

    size = crc32 = 0

    def write(self, data: Any) -> int:
        written = super().write(data)
        self.crc32 = zlib.crc32(memoryview(data)[:written], self.crc32)
        self.size += written
        return written


class _Collected(io.BufferedWriter):
    """A file that collects small writes; those of `_SMALL_BYTES` and more are not copied."""

    def fileno(self) -> int:
        """Return the descriptor of the file, to which all bytes are written before: DCP syncs it."""
        self.flush()
        return super().fileno()
