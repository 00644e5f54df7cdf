"""What a source of weights is, and how each rank reads its own part of a tensor from a file."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trainer.distributed.processes import agreeing, gather, own_rank, world_size
from trainer.errors import ConfigError
from trainer.rundir.files import open_regular

KEY = "init_from"
Region = tuple[slice, ...]
"""Part of a tensor: one slice per dimension."""


class Source(ABC):
    """Named tensors in files that a rank can read in parts."""

    kind: str
    """Kind of the source, for `meta.json`."""
    path: Path
    """File, folder or checkpoint."""
    tensors: Mapping[str, Tensor]
    """A meta tensor of the shape and dtype of each stored tensor, by name."""
    aliases: Mapping[str, str]
    """Names among `tensors` that are second names of others, as tied tensors have them, each with the first name."""
    files: Sequence[Path]
    """Files whose digests identify the source."""
    facts: Mapping[str, Any]
    """Further facts for `meta.json`, JSON values."""
    notes: Sequence[str]
    """Notes for the user."""

    @abstractmethod
    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Copy stored tensors into tensors of the same shape, in place, each rank its own part.

        Args:
            targets: tensor or DTensor by stored name, of any floating-point dtype; the same names on every rank.

        Raises:
            ConfigError: A file cannot be read, or a value does not fit the dtype of its target.

        Collectives: those of DCP, for a checkpoint; else none.
        """


@dataclass(frozen=True)
class Origin:
    """Origin of the weights that a run starts from."""

    facts: Mapping[str, Any]
    """Path, kind and digests for `meta.json` and exports, JSON values."""
    notes: Sequence[str]
    """Notes for the user."""


def own_part(target: Tensor) -> tuple[Tensor, Region]:
    """Return the part of a tensor that this rank holds, and its place in the whole tensor."""
    if not isinstance(target, DTensor):
        return target, tuple(slice(0, length) for length in target.shape)
    if any(isinstance(placement, Partial) for placement in target.placements):
        raise ConfigError(f"a parameter with placement {target.placements} cannot be loaded in parts")
    shape, offsets = compute_local_shape_and_global_offset(
        target.shape, target.device_mesh, target.placements
    )
    local = target.to_local()
    if tuple(local.shape) != tuple(shape):
        raise ConfigError(
            f"expected {tuple(shape)} as this rank's part of a tensor, got {tuple(local.shape)}"
        )
    return local, tuple(slice(start, start + length) for start, length in zip(offsets, shape, strict=True))


@torch.no_grad()
def copy_part(name: str, target: Tensor, read: Callable[[Region], Tensor]) -> None:
    """Copy this rank's part of a stored tensor into a tensor or DTensor; `read` returns a part.

    Parts without elements are not read. The name is for messages.

    Raises:
        ConfigError: A finite value is too large for the dtype of the target.
    """
    local, region = own_part(target)
    if local.numel():
        copy_values(name, read(region), local)


@torch.no_grad()
def copy_values(name: str, values: Tensor, target: Tensor) -> None:
    """Copy values into a tensor of the same shape, in place; arguments and errors as for `copy_part`."""
    target.copy_(values)
    if is_lossy(values.dtype, target.dtype) and not target.isfinite().all() and values.isfinite().all():
        raise ConfigError(
            f"{name} has the value {values.abs().max().item():.3g}, too large for the model's"
            f" {str(target.dtype).removeprefix('torch.')}"
        )


def is_lossy(stored: torch.dtype, kept: torch.dtype) -> bool:
    """Return whether a cast can change values; all floating-point types of the same numbers are not lossy."""
    if not (stored.is_floating_point and kept.is_floating_point):
        return stored != kept
    narrow, wide = torch.finfo(stored), torch.finfo(kept)
    return wide.eps > narrow.eps or wide.max < narrow.max


def sha256_of_files(files: Sequence[Path], root: Path) -> dict[str, str]:
    """Return the SHA-256 of each file by its path below the folder `root`; each rank reads a part of the files.

    Raises:
        ConfigError: A file cannot be read.

    Collectives: two object all-gathers.
    """
    own = {}
    with agreeing("taking the digests of the source"):
        for path in files[own_rank() :: world_size()]:
            try:
                with open_regular(path) as file:
                    digest = hashlib.file_digest(file, "sha256")
            except OSError as error:
                raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
            own[path.absolute().relative_to(root).as_posix()] = digest.hexdigest()
    return dict(sorted(item for part in gather(own) for item in part.items()))
