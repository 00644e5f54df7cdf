"""Save checkpoints and load them, on any number of ranks.

A checkpoint `step-00000500/` holds the tensors as files of torch.distributed.checkpoint (DCP), all other values in
`state.json`, and the marker `COMMIT.json` with the size and CRC-32 of each file. The files are written to a temporary
folder. The marker is written last and removed first. A folder without it is no checkpoint; the next save removes it.

A DTensor is stored once, as a whole tensor, from all its shards. Of a plain tensor the copy of the first rank is
stored, so a plain tensor must be the same on all ranks. All ranks must use the same file system. The collectives send
Python objects: with a CPU backend in the default process group (`cpu:gloo,cuda:nccl`) they do not use the device.
"""

import errno
import json
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor

from trainer.checkpoint.format import (
    INDEX,
    MARKER,
    SCALARS,
    CheckpointError,
    CheckpointMisfit,
    DamagedCheckpoint,
    Reader,
    Writer,
    check_files,
    committed,
    damaged,
    digests,
    read_index,
    read_marker,
    read_values,
    tensor_entries,
)
from trainer.checkpoint.places import clear_way, prune
from trainer.distributed.processes import agreeing, gather, on_main, own_rank, world_size
from trainer.rundir.files import sync_directory, write_atomically


def save_checkpoint(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    *,
    keep: int,
    session: Mapping[str, Any] | None = None,
    warn: Callable[[str], object] = lambda warning: None,
) -> Path:
    """Write and commit a checkpoint, then delete old ones. Every rank must call this with the same names.

    Collectives: a few small object gathers and broadcasts on the default group; none without a process group. An
    error on any rank is raised on all of them.

    Args:
        folder: folder of all checkpoints of the run, made if missing in its own folder. Only its entries `step-*` are
            changed.
        step: optimizer steps done. If a checkpoint of this step exists, nothing is written.
        state: nested mappings with string keys. Leaves are tensors, DTensors or JSON values (tuples are loaded as
            lists); plain tensors and JSON values of the first rank are stored.
        keep: number of newest checkpoints to keep, at least 1; the new one is always kept.
        session: JSON values to store in the marker (see `trainer.checkpoint.continuity`); those of rank 0 are stored.
        warn: function that shows a warning about the folder, called on rank 0: something had a checkpoint's name, or an
            old checkpoint could not be deleted.

    Returns:
        The committed checkpoint.

    Raises:
        ValueError: Two leaves share a name, or ranks differ in the names, shapes or dtypes of tensors.
        TypeError: A key is no string, or a leaf is neither a tensor nor a JSON value.
        OSError: The checkpoint could not be written; earlier checkpoints are unchanged.
    """
    if keep < 1:
        raise ValueError(f"save_checkpoint: keep is {keep}; expected at least 1")
    tensors: dict[str, Tensor] = {}
    with agreeing("checking what is saved", Exception):
        scalars = _json(_split(state, tensors))
    _check_same_on_all_ranks(tensors)
    path = folder / f"step-{step:08d}"
    aside = path.with_name(f"{path.name}.tmp")

    def make_way() -> bool:
        if not path.is_symlink() and (path / MARKER).is_file():
            return False
        for warning in clear_way(folder, path, aside):
            warn(warning)
        return True

    if not on_main(make_way, "making the checkpoint's folder"):
        return path
    _write(aside, tensors)
    with agreeing("taking the checkpoint's checksums", Exception):
        own = digests(sorted(aside.glob(f"__{own_rank()}_*.distcp")))
    files = {name: entry for part in gather(own) for name, entry in part.items()}
    with agreeing("committing the checkpoint", Exception):
        if own_rank() == 0:
            _commit(path, aside, scalars, files, {"step": step, **({"session": session} if session else {})})
            for warning in prune(folder, path, keep):
                warn(warning)
    return path


def _write(aside: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        with _first_failure():
            planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            dcp.save(tensors, storage_writer=Writer(aside), planner=planner)
    except RuntimeError as error:
        # If the disk fills up within a tensor, torch's archive writer raises a RuntimeError that names its own file.
        if "inline_container" not in str(error):
            raise
        raise OSError(errno.EIO, f"a file of {aside.name} could not be finished (disk full?)") from error


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the committed checkpoint of the highest step; None if there is none."""
    checkpoints = committed(folder)
    return checkpoints[-1] if checkpoints else None


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
        CheckpointError: As for `stored_scalars`, or a value is missing or has a wrong type.
    """
    values = stored_scalars(path).get("progress")
    try:
        progress = Progress(**{name: values[name] for name in Progress._fields if name in values})  # type: ignore[index, operator]
    except TypeError as error:
        raise damaged(path, SCALARS, f"has no progress of a run ({error!r})") from error
    if not (
        all(isinstance(number, int) for number in (progress.step, progress.skipped))
        and isinstance(progress.averages, list)
        and all(isinstance(name, str) for name in progress.averages)
        and isinstance(progress.samples, int | None)
        and isinstance(progress.lr, float | None)
    ):
        raise damaged(path, SCALARS, "has a progress of wrong types")
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
    _split(state, tensors)
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
        _check_fits(self._path, self._index, {name: tensor})
        unread = self._file_of.get(name, set()) - self._verified
        check_files(self._path, sorted(unread), self._files)
        self._verified |= unread
        _read(self._path, self._index, {name: tensor})
        return tensor


def _read(path: Path, index: Metadata, tensors: dict[str, Tensor]) -> None:
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with _first_failure():
            dcp.load(tensors, storage_reader=Reader(path, index), planner=planner)
    except Exception as error:  # a damaged pickle may raise anything
        # The files were verified before, so the cause may be memory, open files or the network.
        distrusted = not isinstance(error, OSError | RuntimeError | MemoryError)
        reason = (str(error).splitlines() or [""])[0]
        raise (DamagedCheckpoint if distrusted else CheckpointError)(
            f"{path} cannot be read: {type(error).__name__}: {reason}"
        ) from error


def _split(state: Mapping[str, Any], tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """Move the tensors of `state` into `tensors` under `/`-joined names; return the rest, nested as it is."""
    rest: dict[str, Any] = {}
    for name, value in state.items():
        key = f"{prefix}{name}"
        if not isinstance(name, str):
            raise TypeError(f"checkpoint: key {key} is a {type(name).__name__}; expected a string")
        if isinstance(value, Mapping):
            rest[name] = _split(value, tensors, f"{key}/")
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


def _commit(path: Path, aside: Path, scalars: str, files: dict[str, Any], marker: Mapping[str, Any]) -> None:
    write_atomically(aside / SCALARS, scalars, make_folder=False)
    files = {**files, **digests([aside / SCALARS, aside / INDEX])}
    sync_directory(aside)
    aside.rename(path)
    sync_directory(path.parent)
    write_atomically(
        path / MARKER, json.dumps({**marker, "files": files}, indent=1) + "\n", make_folder=False
    )


@contextmanager
def _first_failure() -> Iterator[None]:
    """Raise the error of the first failing rank; DCP wraps it in a BaseException."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
