"""Read checkpoints, on any number of ranks; `trainer.checkpoint.writing` writes them.

A checkpoint `step-00000500/` holds the tensors as files of torch.distributed.checkpoint (DCP), all other values in
`state.json`, and the marker `COMMIT.json` with the size and CRC-32 of each file. The files are written to a temporary
folder. The marker is written last and removed first. A folder without it is no checkpoint; the next save removes it.

A DTensor is stored once, as a whole tensor, from all its shards. Of a plain tensor the copy of the first rank is
stored, so a plain tensor must be the same on all ranks. All ranks must use the same file system. The collectives send
Python objects: with a CPU backend in the default process group (`cpu:gloo,cuda:nccl`) they do not use the device.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata

from trainer.checkpoint.format import (
    INDEX,
    CheckpointError,
    CheckpointMisfit,
    DamagedCheckpoint,
    Reader,
    check_files,
    damaged,
    read_index,
    read_marker,
    read_values,
    tensor_entries,
)
from trainer.distributed.processes import agreeing, own_rank, world_size
from trainer.rundir.checkpoints import FOLDER, SCALARS, committed

MAX_COUNT = 2**53
"""Largest number of steps or samples that a checkpoint may have."""


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the committed checkpoint of the highest step; None if there is none."""
    return next(reversed(committed(folder)), None)


def stored_tensors(path: Path) -> dict[str, Tensor]:
    """Return a meta tensor of the global shape and dtype for each tensor in a checkpoint, by name.

    Raises:
        CheckpointError: `path` is no committed checkpoint, or its index is not trusted.
    """
    return {
        key: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for key, entry in tensor_entries(read_index(path)).items()
    }


def stored_scalars(path: Path) -> dict[str, Any]:
    """Return the JSON values of a checkpoint, nested as they were saved.

    Raises:
        CheckpointError: `path` is no committed checkpoint, or its `state.json` cannot be read.
    """
    read_marker(path)
    return read_values(path, SCALARS)


class Progress(NamedTuple):
    """Progress of a run at a checkpoint."""

    step: int
    """Optimizer steps done."""
    skipped: int
    """Steps not taken because they were not finite."""
    averages: list[str]
    """Names of the averages."""
    samples: int | None = None
    """Training samples that the steps used; None in a checkpoint of an earlier version."""
    lr: float | None = None
    """Learning rate of the last step; None in a checkpoint of an earlier version."""


def stored_progress(path: Path) -> Progress:
    """Return the progress of the run that a checkpoint stores.

    Raises:
        CheckpointError: As for `stored_scalars`, or a value is missing, has a wrong type or cannot be that of a run.
    """
    values = stored_scalars(path).get("progress")
    try:
        progress = Progress(**{name: values[name] for name in Progress._fields if name in values})  # type: ignore[index, operator]
    except TypeError as error:
        raise damaged(path, SCALARS, f"has no progress of a run ({error!r})") from error
    counts = [number for number in (progress.step, progress.skipped, progress.samples) if number is not None]
    if not (
        all(type(number) is int for number in (progress.step, progress.skipped, *counts))
        and isinstance(progress.averages, list)
        and all(isinstance(name, str) for name in progress.averages)
        and isinstance(progress.lr, float | None)
    ):
        raise damaged(path, SCALARS, "has a progress of wrong types")
    named = FOLDER.fullmatch(path.name)
    if named and int(named[1]) != progress.step:
        raise damaged(path, SCALARS, f"is of step {progress.step}, not of the step in the folder's name")
    possible = min(counts) >= 0 and max(counts) <= MAX_COUNT and progress.skipped <= progress.step
    if not (possible and math.isfinite(progress.lr or 0)):
        raise damaged(path, SCALARS, "has a progress that no run has")
    return progress


def load_checkpoint(path: Path, state: Mapping[str, Any], *, verified: bool = False) -> dict[str, Any]:
    """Verify a checkpoint, then load it into the tensors of `state`, in place and with their sharding.

    The checkpoint may come from any number of ranks. Stored tensors that are not in `state` are not loaded. JSON values
    in `state` are ignored. If a tensor of `state` is missing in the checkpoint, nothing is loaded.

    Collectives: those of DCP and object all-gathers. Every rank must call this with the same names; each rank verifies
    a part of the files.

    Args:
        path: committed checkpoint.
        state: mapping nested like the saved one; its tensors and DTensors are overwritten.
        verified: whether these ranks have verified the files before, so that the checksums are skipped.

    Returns:
        The stored JSON values, nested as saved, with the tensors of `state` in their places.

    Raises:
        DamagedCheckpoint: A file is damaged; names it.
        CheckpointError: The checkpoint could not be read for a reason that may be temporary (memory, open files,
            network).
        CheckpointMisfit: A tensor is missing or has another shape or dtype; names it.
    """
    tensors: dict[str, Tensor] = {}
    split(state, tensors)
    with agreeing("verifying the checkpoint", Exception):
        files = read_marker(path)
        check_files(path, [] if verified else sorted(files)[own_rank() :: world_size()], files)
        index = read_index(path)
        _check_fits(path, index, tensors)
        scalars = stored_scalars(path)
    if tensors:
        _read(path, index, tensors)
    return _joined(state, scalars)


class TensorReader:
    """Reader of single whole tensors of a committed checkpoint, without collectives.

    Each file is verified before the first tensor is read from it.

    Raises:
        CheckpointError: `path` is no committed checkpoint, or its index is damaged or not trusted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files = read_marker(path)
        check_files(path, (INDEX, SCALARS), self._files)
        self._index = read_index(path)
        self._file_of: dict[str, set[str]] = {}
        for place, info in self._index.storage_data.items():
            self._file_of.setdefault(place.fqn, set()).add(info.relative_path)
        self._verified: set[str] = set()

    def read(self, name: str) -> Tensor:
        """Return the tensor of a name, on the CPU, in its stored dtype; peak memory: the tensor and one shard.

        Raises:
            CheckpointError: A file is damaged, or the tensor is missing; names it.
        """
        entry = tensor_entries(self._index).get(name)
        if entry is None:
            raise CheckpointMisfit(f"{self._path} has no tensor {name}", name)
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
        unread = self._file_of.get(name, set()) - self._verified
        check_files(self._path, sorted(unread), self._files)
        self._verified |= unread
        _read(self._path, self._index, {name: tensor})
        return tensor


def _read(path: Path, index: Metadata, tensors: dict[str, Tensor]) -> None:
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with first_failure():
            dcp.load(tensors, storage_reader=Reader(path, index), planner=planner)
    except Exception as error:  # a damaged pickle may raise anything
        # The files were verified before, so the cause may be memory, open files or the network.
        distrusted = not isinstance(error, OSError | RuntimeError | MemoryError)
        reason = (str(error).splitlines() or [""])[0]
        raise (DamagedCheckpoint if distrusted else CheckpointError)(
            f"{path} cannot be read: {type(error).__name__}: {reason}"
        ) from error


def split(state: Mapping[str, Any], tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """Move the tensors of `state` into `tensors` under `/`-joined names; return the rest, nested as it is."""
    rest: dict[str, Any] = {}
    for name, value in state.items():
        key = f"{prefix}{name}"
        if not isinstance(name, str):
            raise TypeError(f"checkpoint: key {key} is a {type(name).__name__}; expected a string")
        if isinstance(value, Mapping):
            rest[name] = split(value, tensors, f"{key}/")
        elif not isinstance(value, Tensor):
            rest[name] = value
        elif key in tensors:
            raise ValueError(f"checkpoint: two tensors are named {key}")
        else:
            tensors[key] = value
    return rest


def _joined(state: Mapping[str, Any], scalars: Mapping[str, Any]) -> dict[str, Any]:
    whole = dict(scalars)
    for name, value in state.items():
        if isinstance(value, Mapping):
            below = scalars.get(name)
            whole[name] = _joined(value, below if isinstance(below, dict) else {})
        elif isinstance(value, Tensor):
            whole[name] = value
    return whole


def _check_fits(path: Path, index: Metadata, tensors: Mapping[str, Tensor]) -> None:
    entries = tensor_entries(index)
    for key, tensor in tensors.items():
        entry = entries.get(key)
        if entry is None:
            raise CheckpointMisfit(f"{path} has no tensor {key}", key)
        for what, stored, wanted in (
            ("shape", tuple(entry.size), tuple(tensor.shape)),
            ("dtype", entry.properties.dtype, tensor.dtype),
        ):
            if stored != wanted:
                raise CheckpointMisfit(
                    f"{path}: {key} has {what} {stored}, expected {wanted}", key, what == "dtype"
                )


@contextmanager
def first_failure() -> Iterator[None]:
    """Raise the error of the first failing rank; DCP wraps it in a BaseException."""
    alone = not dist.is_initialized()
    try:
        # A thread changes no filters, because they are those of the whole process.
        with warnings.catch_warnings() if alone else nullcontext():
            if alone:
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
