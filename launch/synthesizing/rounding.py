"""How large the rounding errors of stored weights are, in steps of the live weights.

Combining stored weights also adds up their rounding errors, times the coefficients. `ema.posthoc.solve` weighs these
errors against the distance to the target, which it knows in steps. What a step is, the weights show: the distance of an
average from the live weights is that of as many independent steps as `ema.posthoc.distances` says.
"""

import math

import torch
from torch import nn

from ema.posthoc import Snapshot, distances
from ema.swap import squares_beside
from launch.synthesizing.basis import Basis
from launch.synthesizing.weights import Stock
from trainer.checkpoint.changes import STORED
from trainer.rundir.keys import LIVE

SUM = torch.float32
"""Least dtype in which weights are added up, and that of the averages whose changes are stored."""
ONCE = 0.21
"""Expected error of one rounding, as a share of `eps`, for numbers whose logarithms are uniform: sqrt(1/12 * 0.54)."""


@torch.no_grad()
def rounding_of(basis: Basis, stock: Stock, model: nn.Module) -> list[float] | None:
    """Return the rounding error of each of `basis.kept` in steps, or None if the weights show no step.

    An element of an average is taken to be wrong by `eps` of its dtype, because each update rounds it again. A stored
    change is rounded once. Live weights are what averages consist of; only their sum is rounded.

    Args:
        basis: stored weights.
        stock: the same weights, to read one of them.
        model: model with the live weights of the basis's step.

    Collectives: those of `Stock.weights`, and an all-reduce.
    """
    snapshots = [one.snapshot for one in basis.kept]
    apart = distances(snapshots, [Snapshot(basis.step)] * len(snapshots))
    others = [(one.snapshot.step, far, one) for one, far in zip(basis.kept, apart, strict=True) if far > 0]
    if not others:
        return None
    _, steps, newest = max(others, key=lambda one: one[0])
    squares = squares_beside(model, stock.weights(newest))
    live = {name: own for name, (own, _) in squares.items()}
    apart_by = math.fsum(difference for _, difference in squares.values())
    step = math.sqrt(max(apart_by, math.fsum(live.values()) * torch.finfo(SUM).eps ** 2)) / steps
    if not (math.isfinite(step) and step > 0):
        return None
    before = [one.snapshot if one.before is None else one.before.snapshot for one in basis.kept]
    found = []
    for one, change in zip(basis.kept, distances(snapshots, before), strict=True):
        exact = live.keys() if one.name == LIVE else one.changes
        dtypes = {
            name: torch.promote_types(tensor.dtype, SUM) if name in exact else tensor.dtype
            for name, tensor in one.tensors.items()
        }
        rounded = math.fsum(torch.finfo(dtypes[name]).eps ** 2 * square for name, square in live.items())
        found.append(math.hypot(math.sqrt(rounded) / step, ONCE * torch.finfo(STORED).eps * change))
    return found
