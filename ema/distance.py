"""How far averages are from the live weights, whole and by block, from local sums and one small all-reduce."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ema.average import ExponentialMovingAverage
from ema.names import Slot, Walk, is_dtensor, local
from ema.shards import part_for
from ema.swap import refuse_swapped


@dataclass(frozen=True)
class Divergence:
    """M is the average, theta the live weights, over the parameters that the average tracks."""

    rel_l2: float
    """|M - theta| / |theta|."""
    cosine: float
    """Cosine of the angle between M and theta."""
    decay: float
    """As `ExponentialMovingAverage.decay`."""
    blocks: dict[str, float] = field(default_factory=dict)
    """rel_l2 of each block alone."""


def block_name(name: str) -> str:
    """`blocks.3` for `blocks.3.attention.weight`, `head` for `head.weight`: a number belongs to its list."""
    parts = name.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0]


@torch.no_grad()
def divergence(
    averages: Mapping[str, ExponentialMovingAverage],
    model: nn.Module,
    *,
    block_of: Callable[[str], str] | None = None,
) -> dict[str, Divergence]:
    """Measure all averages (a bank is such a mapping) against the live weights of `model`.

    Before its start an average is the live weights: rel_l2 0, cosine 1.

    Args:
        averages: by name.
        model: the live model, wrapped or not.
        block_of: block of a canonical parameter name; `block_name` if not given.

    Collectives: one all-reduce of one float64 tensor if torch.distributed is initialised, whatever the number of
    averages and blocks. The host waits for the device once.

    Raises:
        RuntimeError: while an average is swapped into the model.
    """
    if not averages:
        return {}
    walk = next(iter(averages.values()))._walk
    walk.retarget(model)
    refuse_swapped(walk, "measure the divergence")
    walk.refresh()
    keys: list[tuple[str, str]] = []
    sums: list[Tensor] = []
    for name, average in averages.items():
        for block, slots in _blocks(walk, average, block_of or block_name).items():
            keys.append((name, block))
            sums.append(_block_sums(average, slots))
    table = torch.stack(sums)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(table)
    rows = dict(zip(keys, table.tolist(), strict=True))
    result = {}
    for name, average in averages.items():
        blocks = {block: row for (owner, block), row in rows.items() if owner == name}
        total = [math.fsum(column) for column in zip(*blocks.values(), strict=True)]
        result[name] = Divergence(
            rel_l2=_rel_l2(total),
            cosine=_cosine(total),
            decay=average.decay,
            blocks={block: _rel_l2(row) for block, row in blocks.items()},
        )
    return result


def _blocks(
    walk: Walk, average: ExponentialMovingAverage, block_of: Callable[[str], str]
) -> dict[str, list[Slot]]:
    blocks: dict[str, list[Slot]] = {}
    for name in average._coverage.averaged:
        blocks.setdefault(block_of(name), []).append(walk.by_name[name])
    return blocks


def _block_sums(average: ExponentialMovingAverage, slots: list[Slot]) -> Tensor:
    """float64 [3]: sums of (M - theta)^2, theta^2 and M^2 over this rank's share of a block.

    What several ranks hold is divided by their number, so that the sum over all ranks counts it once.
    """
    total: Tensor | None = None
    for slot in slots:
        live = local(slot.tensor).detach()
        shadow = live
        if average.started:
            shadow = part_for(slot.tensor, average._shadows[slot.name]).to(live.device)
        wide = torch.promote_types(torch.promote_types(live.dtype, shadow.dtype), torch.float32)
        live, shadow = live.to(wide), shadow.to(wide)
        norms = [
            torch.linalg.vector_norm(part, dtype=_norm_dtype(part)) for part in (shadow - live, live, shadow)
        ]
        squares = torch.stack(norms).square().real.to(_home(slot.tensor)) / _replicas(slot.tensor)
        total = squares if total is None else total + squares.to(total.device)
    assert total is not None  # a block exists through its slots
    return total


def _norm_dtype(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def _home(tensor: Tensor) -> torch.device:
    # Offloaded shards lie where their process group cannot reduce.
    return torch.device(tensor.device_mesh.device_type) if is_dtensor(tensor) else tensor.device  # type: ignore[attr-defined]


def _replicas(tensor: Tensor) -> float:
    """On how many ranks of the job each element lies."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    shards = 1
    if is_dtensor(tensor):
        mesh = tensor.device_mesh  # type: ignore[attr-defined]
        for dim, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
            if not placement.is_replicate():
                shards *= mesh.size(dim)
    return dist.get_world_size() / shards


def _rel_l2(sums: list[float]) -> float:
    difference, live, _ = sums
    return math.sqrt(difference / live) if live > 0 else (math.inf if difference > 0 else 0.0)


def _cosine(sums: list[float]) -> float:
    # From the difference, which is summed by itself: the product of nearly equal tensors would cancel.
    difference, live, average = sums
    if live == 0 or average == 0:
        return 1.0 if live == average else 0.0
    cosine = (live + average - difference) / (2 * math.sqrt(live * average))
    return max(-1.0, min(1.0, cosine))
