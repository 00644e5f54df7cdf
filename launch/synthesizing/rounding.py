"""How large the rounding errors of stored weights are, in steps of the live weights.

Combining stored weights also adds up their rounding errors, times the coefficients. `ema.posthoc.solve` weighs these
errors against the distance to the target.
"""

import math

import torch
from torch import nn

from ema.posthoc import Snapshot
from ema.rounding import ONCE, distances, roundings
from ema.swap import squares_beside
from launch.synthesizing.basis import Basis
from launch.synthesizing.weights import Stock, Synthesized
from trainer.checkpoint.changes import STORED
from trainer.rundir.keys import LIVE

SUM = torch.float32
"""Least dtype in which weights are added up, and that of the averages whose changes are stored."""


@torch.no_grad()
def rounding_of(basis: Basis, stock: Stock, model: nn.Module) -> list[float] | None:
    """Return the rounding error of each of `basis.kept` in steps, or None if the weights show no step.

    An element of an average is taken to be wrong by the roundings of its updates, and at least by `eps` of its dtype. A
    stored change is rounded once more. Live weights are what averages consist of; only their sum is rounded.

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
    squares = squares_beside(model, Synthesized(stock, [newest], [1.0]).weights(model))
    live = {name: own for name, (own, _) in squares.items()}
    apart_by = math.fsum(difference for _, difference in squares.values())
    step = math.sqrt(max(apart_by, math.fsum(live.values()) * torch.finfo(SUM).eps ** 2)) / steps
    if not (math.isfinite(step) and step > 0):
        return None
    before = [one.snapshot if one.before is None else one.before.snapshot for one in basis.kept]
    found = []
    changes = distances(snapshots, before)
    for one, change, updates in zip(basis.kept, changes, roundings(snapshots), strict=True):
        exact = live.keys() if one.name == LIVE else one.changes
        dtypes = {
            name: torch.promote_types(tensor.dtype, SUM) if name in exact else tensor.dtype
            for name, tensor in one.tensors.items()
        }
        rounded = math.fsum(torch.finfo(dtypes[name]).eps ** 2 * square for name, square in live.items())
        own = max(1.0, updates) * math.sqrt(rounded) / step
        found.append(math.hypot(own, ONCE * torch.finfo(STORED).eps * change))
    return found
