"""How large the rounding errors of averages are, for `ema.posthoc.solve`, which weighs them against other errors.

`solve` counts in steps of the live weights. What a step is, the weights show: the distance of an average from the live
weights is that of as many independent steps as `distances` says.
"""

from collections.abc import Sequence

import torch

from ema.rows import Snapshot, gains, rows

ONCE = 0.21
"""Expected error of one rounding, as a share of `eps`, for numbers whose logarithms are uniform: sqrt(1/12 * 0.54)."""


def distances(ones: Sequence[Snapshot], others: Sequence[Snapshot]) -> list[float]:
    """Return the expected distance of each pair of snapshots in norms of a step, if the steps are independent."""
    last = max((one.step for one in (*ones, *others)), default=0)
    tails = torch.zeros(len(ones), dtype=torch.float64)
    squares = torch.zeros_like(tails)
    for _, block in rows([*ones, *others], last):
        summed = (block[:, : len(ones)] - block[:, len(ones) :]).flip(0).cumsum(0) + tails
        tails = summed[-1]
        squares += summed.square().sum(0)
    return squares.sqrt().tolist()


def roundings(snapshots: Sequence[Snapshot]) -> list[float]:
    """Return the expected rounding error of each average as a share of `eps`; 0 for live weights.

    Each update rounds the average once, and the decays of all later ones reduce that error. An update of gain 1 copies.
    So a constant decay of horizon h has about ONCE * sqrt(h / 2). Weights that change by less than a rounding in an
    update are worse, because their errors are not independent.
    """
    found = [0.0] * len(snapshots)
    groups: dict[str, list[int]] = {}
    for number, one in enumerate(snapshots):
        if one.config is not None:
            groups.setdefault(f"{one.start} {one.config} {id(one.rule)}", []).append(number)
    for members in groups.values():
        longest = max((snapshots[number] for number in members), key=lambda one: one.step)
        shares = gains(longest, longest.start, longest.step + 1)
        for number in members:
            own = shares[: snapshots[number].step + 1 - longest.start].flip(0)
            later = torch.cat([own.new_zeros(1), torch.log1p(-own[:-1])]).cumsum(0).exp()
            found[number] = ONCE * later[(own > 0) & (own < 1)].norm().item()
    return found
