"""How large the rounding errors of stored weights are, in steps of the live weights.

Combining stored weights also adds up their rounding errors, times the coefficients. `ema.posthoc.solve` weighs these
errors against the distance to the target, which it knows in steps. What a step is, the weights show: the distance of an
average from the live weights is that of as many independent steps as `ema.posthoc.distances` says.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ema.memory import local
from ema.posthoc import Snapshot, distances
from ema.squares import block_sums
from ema.walk import Walk
from launch.synthesizing.basis import Basis, Kept
from launch.synthesizing.weights import Stock
from trainer.checkpoint.changes import STORED
from trainer.rundir.keys import LIVE

SUM = torch.float32
"""Dtype in which weights are added up, and of the averages whose changes are stored."""
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
    live, difference = _squares(newest, stock, model)
    whole = math.fsum(live.values())
    step = math.sqrt(max(difference, whole * torch.finfo(SUM).eps ** 2)) / steps
    if not (math.isfinite(step) and step > 0):
        return None
    before = [one.snapshot if one.before is None else one.before.snapshot for one in basis.kept]
    found = []
    for one, change in zip(basis.kept, distances(snapshots, before), strict=True):
        in_sum = live.keys() if one.name == LIVE else one.changes
        dtypes = {name: SUM if name in in_sum else one.tensors[name].dtype for name in live}
        squares = math.fsum(torch.finfo(dtypes[name]).eps ** 2 * square for name, square in live.items())
        found.append(math.hypot(math.sqrt(squares) / step, ONCE * torch.finfo(STORED).eps * change))
    return found


def _squares(one: Kept, stock: Stock, model: nn.Module) -> tuple[dict[str, float], float]:
    """Return the sum of squares of each live parameter by the name in `one`, and that of the difference to `one`."""
    walk = Walk(model)
    own = {walk.by_name[name].name: name for name in one.tensors if name in walk.by_name}
    names = tuple(name for name in walk.params if name in own)
    weights = stock.weights(one)

    def parts(some: list[str]) -> list[Tensor]:
        return [local(weights[own[name]]) for name in some]

    _, table = block_sums(walk, names, [parts], str)
    if dist.is_initialized():
        dist.all_reduce(table)
    live, difference, _ = table.T.tolist()
    return {own[name]: square for name, square in zip(names, live, strict=True)}, math.fsum(difference)
