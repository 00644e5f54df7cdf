"""Bytes of tensors and of their parts on the first and on the last rank; DTensor's own rule says how they are cut."""

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


@dataclass(frozen=True)
class Part:
    """Bytes of one tensor."""

    whole: int
    most: int
    """On the first rank: parts that are longer come first, as `torch.chunk` cuts."""
    least: int
    """On the last rank."""


@dataclass
class Layout:
    """The tensors of a run."""

    parameters: list[Part] = field(default_factory=list)
    gradients: list[Part] = field(default_factory=list)
    optimizer: list[Part] = field(default_factory=list)
    averages: dict[str, list[Part]] = field(default_factory=dict)
    """By name, as they are in mode `local_shard`."""


def describe(tensors: Iterable[Any]) -> list[Part]:
    """The parts of the tensors among these."""
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
    """Elements on the first and on the last rank of a mesh."""
    corners = [0] * len(mesh), [size - 1 for size in mesh]
    return [prod(_compute_local_shape_and_global_offset(shape, mesh, one, placements)[0]) for one in corners]


def checkpoint_bytes(state: Any) -> int:
    """Bytes of the files that all ranks together write of a run's state: every tensor once, shard by shard.

    Each shard is written by `torch.save`, whose frame is larger than what it holds if that is small.
    """
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
    whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return whole + sum(map(num_shards, tensors)) * frame_bytes()


def num_shards(tensor: Tensor) -> int:
    """Parts that are not empty, on all ranks together; replicas count once."""
    if not isinstance(tensor, DTensor):
        return 1
    count = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        if isinstance(placement, Shard) and tensor.shape[placement.dim]:
            length = tensor.shape[placement.dim]
            count *= -(-length // -(-length // size))
    return count


def frame_bytes() -> int:
    """What `torch.save` writes around a tensor."""
    file = io.BytesIO()
    tensor = torch.zeros(16)
    torch.save(tensor, file)
    return file.tell() - tensor.nbytes
