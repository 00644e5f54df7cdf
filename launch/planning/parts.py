"""Sizes of full tensors and of their shards on the first and the last rank, computed by DTensor's own function."""

import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.utils._pytree import tree_leaves

from ema.memory import local


@dataclass(frozen=True)
class Part:
    """Size of one tensor, in bytes."""

    whole: int
    """Bytes of the full tensor."""
    most: int
    """Bytes on the first rank, which has the largest shard, as with `torch.chunk`."""
    least: int
    """Bytes on the last rank, which has the smallest shard and may have none."""


@dataclass
class Layout:
    """Sizes of the tensors of a run."""

    parameters: list[Part] = field(default_factory=list)
    gradients: list[Part] = field(default_factory=list)
    optimizer: list[Part] = field(default_factory=list)
    averages: dict[str, list[Part]] = field(default_factory=dict)
    """Sizes in mode `local_shard`, by name of the average."""


def describe(tensors: Iterable[Any]) -> list[Part]:
    """Return the sizes of all tensors among `tensors`; other objects are skipped."""
    return [_part(tensor) for tensor in tensors if isinstance(tensor, Tensor)]


def _part(tensor: Tensor) -> Part:
    size = tensor.element_size()
    if not isinstance(tensor, DTensor):
        return Part(*[tensor.numel() * size] * 3)
    mesh = tuple(tensor.device_mesh.shape)
    return Part(
        tensor.numel() * size, *(count * size for count in _ends(tensor.shape, mesh, tensor.placements))
    )


@cache
def _ends(shape: torch.Size, mesh: tuple[int, ...], placements: tuple[Placement, ...]) -> list[int]:
    """Return the numbers of elements on the first and on the last rank of a mesh."""
    corners = [0] * len(mesh), [size - 1 for size in mesh]
    return [prod(_compute_local_shape_and_global_offset(shape, mesh, one, placements)[0]) for one in corners]


def checkpoint_bytes(state: Any) -> int:
    """Return the size in bytes of a checkpoint of `state`, with the files of all ranks.

    Each shard is written once, by `torch.save`; its fixed overhead per shard is counted, because a shard can be
    smaller than this overhead.
    """
    tensors = _tensors(state)
    return sum(tensor.nbytes for tensor in tensors) + sum(map(num_shards, tensors)) * frame_bytes()


def own_bytes(state: Any) -> int:
    """Return the size in bytes of this rank's part of the tensors of `state`."""
    return sum(local(tensor).nbytes for tensor in _tensors(state))


def own_file_bytes(state: Any) -> int:
    """Return the size in bytes of the files that this rank writes of `state`, each shard by `torch.save`."""
    parts = sum(local(tensor).numel() > 0 for tensor in _tensors(state))
    return own_bytes(state) + parts * frame_bytes()


def _tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]


def num_shards(tensor: Tensor) -> int:
    """Return the number of non-empty shards on all ranks; replicas count once."""
    if not isinstance(tensor, DTensor):
        return 1
    count = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        if isinstance(placement, Shard) and tensor.shape[placement.dim]:
            length = tensor.shape[placement.dim]
            count *= -(-length // -(-length // size))
    return count


def frame_bytes() -> int:
    """Return the overhead in bytes that `torch.save` adds to one tensor."""
    file = io.BytesIO()
    tensor = torch.zeros(16)
    torch.save(tensor, file)
    return file.getbuffer().nbytes - tensor.nbytes
