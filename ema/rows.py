"""Rows of weights: the share that each step of the live weights has in an average.

The rows of long runs do not fit into memory together, so `rows` yields them block by block, from the last step on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ema.config import EMAConfig
from ema.rules import Rule, gain

BLOCK = 4096
"""Largest number of steps that are in memory at a time."""


@dataclass(frozen=True)
class Snapshot:
    """Average after the update of a step, or the live weights of that step. Also a target of `solve`."""

    step: int
    """Iteration of the last update, at least 0."""
    config: EMAConfig | None = None
    """Rule and settings of the average; None means the live weights."""
    origin: int | None = None
    """Iteration whose weights the average absorbed first, as its counters recorded it; None is `config.start_iter`."""
    rule: Rule | None = None
    """A user's own rule, its arguments bound, instead of `config.type`."""
    skipped: int = 0
    """Iterations since the origin that were not absorbed because they were not finite."""

    @property
    def start(self) -> int:
        """Iteration at which the average is equal to the live weights."""
        if self.config is None:
            return self.step
        return min(self.step, self.config.start_iter if self.origin is None else self.origin)


@dataclass(frozen=True)
class Weights:
    """Target that is given by its weights."""

    step: int
    """Last step, at least 0."""
    values: Tensor
    """Weights of the steps up to the last one, float64 `[steps]`; earlier steps have weight 0. Their sum is 1."""


def rows(snapshots: Sequence[Snapshot | Weights], last: int) -> Iterator[tuple[int, Tensor]]:
    """Yield blocks of the weights of all snapshots, from the last step to step 0.

    Args:
        snapshots: averages and given weights, none later than `last`.
        last: last step of all.

    Yields:
        First step of the block, and float64 weights `[steps, snapshots]`.
    """
    edges = {0, last + 1, *(one.step + 1 for one in snapshots), *range(0, last + 1, BLOCK)}
    remaining = torch.ones(len(snapshots), dtype=torch.float64)
    groups: dict[str, list[int]] = {}
    for number, one in enumerate(snapshots):
        if isinstance(one, Snapshot):
            settled = one.start == one.step  # equal to the live weights of its step, whatever its rule
            groups.setdefault(f"{one.start} {'' if settled else (one.config, id(one.rule))}", []).append(
                number
            )
    for high, low in pairwise(sorted(edges, reverse=True)):
        block = torch.zeros(high - low, len(snapshots), dtype=torch.float64)
        for members in groups.values():
            inside = [number for number in members if snapshots[number].step >= high - 1]
            if inside and snapshots[inside[0]].start < high:  # type: ignore[union-attr]
                shares = gains(snapshots[inside[0]], low, high)  # type: ignore[arg-type]
                kept = torch.cumprod(1 - shares.flip(0), 0).flip(0)
                after = torch.cat([kept[1:], kept.new_ones(1)])
                block[:, inside] = (shares * after)[:, None] * remaining[inside]
                remaining[inside] *= kept[0]
        for number, one in enumerate(snapshots):
            if isinstance(one, Weights):
                _place(one, low, block[:, number])
        yield low, block


def gains(snapshot: Snapshot, low: int, high: int) -> Tensor:
    """Return the gain of each step of a block; the first absorbed step has gain 1."""
    start, config = snapshot.start, snapshot.config
    found = torch.zeros(high - low, dtype=torch.float64)
    if low <= start < high:
        found[start - low] = 1.0
    if config is not None and start < snapshot.step:
        k = config.update_every
        first = max(1, low - start)
        first += -first % k
        if (
            config.type == "constant" and snapshot.rule is None
        ):  # a call for each step would take seconds in long runs
            found[start + first - low :: k] = gain(config, k)
        else:
            values = [gain(config, t, snapshot.rule) for t in range(first, high - start, k)]
            found[start + first - low :: k] = torch.tensor(values, dtype=torch.float64)
    return found


def _place(weights: Weights, low: int, column: Tensor) -> None:
    """Copy the part of given weights that is in a block into its column."""
    first = weights.step + 1 - weights.values.numel()
    begin, end = max(first, low), min(weights.step + 1, low + column.numel())
    if begin < end:
        column[begin - low : end - low] = weights.values[begin - first : end - first]
