"""Averages made after the run: coefficients that combine stored snapshots into the average of a given profile.

A snapshot is an average at a step, or a plain copy of the live weights. Each has a row of weights over the steps
(`ema.rules.profile`), and so has the target. `solve` finds the coefficients x that minimise

    || N (sum_i x_i row_i - target) ||    subject to    sum_i x_i = 1

The sum of every row is 1, with the weight of the first weights that the average absorbed. So the constraint also means
that the combination has the mass of the target. N is one of two norms:

| norm | N                                   | what it measures                                                       |
|------|-------------------------------------|------------------------------------------------------------------------|
| tail | (N d)_r = sum of d_s over s >= r    | the expected error if the steps of the weights are independent         |
| l2   | (N d)_r = d_r                       | the norm of Karras et al. (EDM2, 2024)                                 |

The steps are reduced block by block to a triangular matrix (QR), which is exact and needs no matrix of all steps. The
constraint is eliminated, the columns are scaled to norm 1, and singular values below CUTOFF times the largest are set
to zero. All numbers are float64.

Stored weights are rounded, and large coefficients of opposite signs enlarge their rounding errors. If the size of these
is given, as r_i steps for snapshot i (`ema.rounding`), `solve` also adds sum_i (r_i x_i)^2 to what it minimises and
predicts.

Merging replaces a decay of the learning rate: with independent steps, an average is the run whose step at s was
scaled by the sum of the weights from s on. So the checkpoints get the decrements of the decay (Tian et al., "WSM",
2025, arXiv:2507.17634): `decrements` for checkpoints, `window_profile` for a target of `solve`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ema.config import EMAConfig
from ema.rows import Snapshot, Weights, rows
from ema.rules import Rule
from ema.state import COUNTERS, RULE, SINCE_ORIGIN, UNKNOWN, Counters, read_rule

CUTOFF = 1e-11
"""Singular values below this fraction of the largest are set to zero."""
MAX_CONDITION = 1e8
"""Ratio of singular values above which the warning of large coefficients names snapshots that hardly differ.

Alone it is harmless: two equal snapshots get half of the coefficient each.
"""
MAX_ERROR = 0.05
"""Predicted relative error above which a warning follows."""
ROUNDING = 1e-9
"""A smaller distance between two rows of weights is that of rounding."""
MAX_AMPLIFICATION = 100.0
"""Sum of the magnitudes of the coefficients above which a warning follows."""
NORMS = ("tail", "l2")
SUM_TOLERANCE = 1e-6
"""Largest distance from 1 of the sum of given weights."""

Factor = Callable[[float], float]
"""Factor of the learning rate by the share of the decay that is done, in [0, 1]."""
DECAYS: dict[str, Factor] = {
    "minus_sqrt": lambda done: 1 - math.sqrt(done),
    "linear": lambda done: 1 - done,
    "uniform": lambda done: 1 - done,  # the mean of the newest checkpoints replaces the linear decay
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
"""Decays of the learning rate that a merge of checkpoints can replace, by name."""


@dataclass(frozen=True)
class Synthesis:
    """Coefficients of the snapshots, and how good the combination is."""

    coefficients: list[float]
    """Coefficient of each snapshot; their sum is 1."""
    error: float
    """Predicted distance to the target relative to the distance of the target from the live weights, for independent
    steps. Rounding errors of the snapshots are part of it if `solve` was given them."""
    amplification: float
    """Sum of the magnitudes of the coefficients: the most by which rounding errors of the snapshots grow."""
    condition: float
    """Ratio of the largest to the smallest singular value of the scaled columns."""
    warnings: list[str]
    """Reasons to distrust the combination, one sentence each."""


def saved_snapshot(state: Mapping[str, Any], rule: Rule | None = None) -> Snapshot:
    """Return the snapshot that a saved average is: its step, rule and origin as they were saved.

    The row is exact if the average skipped nothing. The origin is that of the counters, not `start_iter`: the averages
    of earlier versions absorbed the weights after the first step first. Their states do not record that the rule was
    changed, so one rule is assumed for them.

    Args:
        state: what `state_dict` returned; only the counters and the rule are read.
        rule: the callable of a user's own rule, its arguments bound.

    Raises:
        KeyError: The state has no counters or no rule.
        ValueError: They are malformed, the origin is not in them, the rule was changed since the origin, or the
            callable of a user's own rule is missing.
    """
    counters, fields = Counters.from_tensor(state[COUNTERS]), read_rule(state[RULE])
    if counters.last_iteration == UNKNOWN or (counters.started and counters.init_iteration == UNKNOWN):
        raise ValueError(
            f"{COUNTERS!r}: expected the first and the last iteration of the average, got {counters}"
        )
    if not counters.started:
        return Snapshot(counters.last_iteration)
    if not fields.pop(SINCE_ORIGIN, True):
        raise ValueError(f"{RULE!r}: expected one rule since the origin of the average, and it was changed")
    if fields.get("rule") is not None and rule is None:
        raise ValueError(f"{RULE!r}: expected the callable of the rule {fields['rule']!r}, got None")
    try:
        config = EMAConfig(**fields)
        config.validate()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{RULE!r}: expected the settings of a rule: {error}") from error
    return Snapshot(counters.last_iteration, config, counters.init_iteration, rule, counters.num_skipped)


def given_weights(values: Sequence[float] | Tensor, step: int) -> Weights:
    """Return the target with these weights of the steps up to `step`.

    Args:
        values: weights of the steps that end at `step`, at most step + 1 numbers with sum 1.
        step: last step.

    Raises:
        ValueError: There are no weights or too many, one is not finite, or their sum is not 1.
    """
    weights = torch.as_tensor(values, dtype=torch.float64)
    if weights.ndim != 1 or not 1 <= weights.numel() <= step + 1:
        raise ValueError(f"expected 1 to {step + 1} weights in one row, got shape {tuple(weights.shape)}")
    if not weights.isfinite().all():
        raise ValueError(
            f"expected finite weights, but number {int((~weights.isfinite()).nonzero()[0]) + 1} is not"
        )
    total = weights.sum().item()
    if abs(total - 1) > SUM_TOLERANCE:
        raise ValueError(f"expected weights with sum 1, got sum {total:.8g}")
    return Weights(step, weights)


def decrements(factor: Factor, steps: Sequence[int]) -> list[float]:
    """Return the coefficients with which checkpoints replace a decay of the learning rate that begins at the first.

    The decay takes one more interval than there are between the checkpoints, so that equal weights replace the linear
    decay. With w_j = factor at checkpoint j they are 1 - w_1, w_1 - w_2, ..., w_k.

    Args:
        factor: decay of the learning rate; it is divided by its value at 0.
        steps: steps of the checkpoints, rising.

    Raises:
        ValueError: The steps do not rise, or the factor is no number or is 0 at the start.
    """
    if any(later <= earlier for earlier, later in pairwise(steps)):
        raise ValueError(f"expected rising steps, got {list(steps)}")
    span = steps[-1] - steps[0]
    length = span + span / (len(steps) - 1) if len(steps) > 1 else 1.0
    factors = [float(factor((step - steps[0]) / length)) for step in steps]
    if not all(map(math.isfinite, factors)) or factors[0] <= 0:
        raise ValueError(f"expected finite factors that begin above 0, got {factors}")
    tails = [one / factors[0] for one in factors]
    return [now - later for now, later in pairwise([*tails, 0.0])]


def window_profile(factor: Factor, step: int, window: int, every: int = 1) -> Weights:
    """Return the profile that replaces a decay of the learning rate over the newest steps.

    Args:
        factor: decay of the learning rate, one of DECAYS or another.
        step: last step.
        window: number of weighted steps, `every` steps apart, the last of them at `step`.
        every: distance of the weighted steps.

    Raises:
        ValueError: The window begins before step 0, or the factor is refused by `decrements`.
    """
    first = step - (window - 1) * every
    if window < 1 or every < 1 or first < 0:
        raise ValueError(f"window: expected 1 to {step // max(every, 1) + 1} weights, got {window}")
    values = torch.zeros(step - first + 1, dtype=torch.float64)
    values[::every] = torch.tensor(decrements(factor, range(first, step + 1, every)), dtype=torch.float64)
    return Weights(step, values)


def solve(
    snapshots: Sequence[Snapshot],
    target: Snapshot | Weights,
    norm: str = "tail",
    rounding: Sequence[float] | None = None,
) -> Synthesis:
    """Return the coefficients with which snapshots come closest to a target.

    Args:
        snapshots: at least one; none is later than the target.
        target: an average with its step, or given weights.
        norm: `tail` or `l2`.
        rounding: expected norm of the rounding error of each snapshot, divided by the norm of a step of the live
            weights. The norm `l2`, which has no steps, weighs this unit as a difference of 1 in the weight of one step.
            None means that it is unknown: then coefficients may grow large, with a warning.

    Raises:
        ValueError: There is no snapshot, one is later than the target, the norm is unknown, or `rounding` is not one
            finite number of at least 0 for each snapshot.
    """
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    if not snapshots:
        raise ValueError("snapshots: expected at least one")
    late = [one.step for one in snapshots if one.step > target.step]
    if late:
        raise ValueError(f"snapshots: one of step {late[0]} is later than the target of step {target.step}")
    sizes = [0.0] * len(snapshots) if rounding is None else list(map(float, rounding))
    if len(sizes) != len(snapshots) or not all(0 <= one < math.inf for one in sizes):
        raise ValueError(
            f"rounding: expected one finite number of at least 0 for each snapshot ({len(snapshots)}), got {sizes}"
        )
    reduced, to_live = _reduced(snapshots, target, norm)
    roundings = torch.tensor(sizes, dtype=torch.float64)
    solved, condition = _least_squares(torch.cat([reduced[norm], _rounding_rows(roundings)]))
    coefficients = torch.cat([solved, 1 - solved.sum(0, keepdim=True)])
    residual = (reduced["tail"][:, :-1] @ solved - reduced["tail"][:, -1]).norm().item()
    rounded = (roundings * coefficients).norm().item()
    error = math.hypot(residual, rounded) / to_live if to_live else math.inf
    has_target = any(one.start == target.step for one in snapshots)
    if not to_live and (has_target or residual < ROUNDING):  # the live weights, which are among the snapshots
        error = 0.0
    amplification = coefficients.abs().sum().item()
    warnings = _warnings(snapshots, target, error, condition, amplification if rounding is None else 0.0)
    return Synthesis(coefficients.tolist(), error, amplification, condition, warnings)


def _reduced(
    snapshots: Sequence[Snapshot], target: Snapshot | Weights, norm: str
) -> tuple[dict[str, Tensor], float]:
    """Return the triangular matrix of each norm that is needed, and the tail norm from the target to the live weights.

    The columns are those of all snapshots but the last, minus the last one, then the target minus the last one.
    """
    last = target.step
    matrices = {name: torch.zeros(0, len(snapshots), dtype=torch.float64) for name in {"tail", norm}}
    tails = torch.zeros(len(snapshots) + 1, dtype=torch.float64)
    to_live = 0.0
    for low, block in rows([*snapshots, target], last):
        summed = block.flip(0).cumsum(0).flip(0) + tails
        tails = summed[0]
        if low == 0:  # all rows have the same sum, whatever the rounding
            summed[0] = 1.0
        to_live += (1 - summed[:, -1]).square().sum().item()
        for name, matrix in matrices.items():
            part = summed if name == "tail" else block
            others = torch.cat([part[:, :-2], part[:, -1:]], 1) - part[:, -2:-1]
            matrices[name] = torch.linalg.qr(torch.cat([matrix, others]), mode="r").R
    return matrices, math.sqrt(to_live)


def _rounding_rows(rounding: Tensor) -> Tensor:
    """Return the rows of the reduced system for the rounding errors; the last coefficient is 1 minus the others."""
    found = torch.diag(rounding)
    found[-1] = rounding[-1]
    return found


def _least_squares(matrix: Tensor) -> tuple[Tensor, float]:
    """Return the solution of the reduced system, right side in the last column, and its condition."""
    columns, right = matrix[:, :-1], matrix[:, -1]
    if columns.shape[1] == 0:
        return right.new_zeros(0), 1.0
    norms = columns.norm(dim=0)
    scales = torch.where(norms > 0, norms, torch.ones_like(norms))
    left, values, directions = torch.linalg.svd(columns / scales, full_matrices=False)
    kept = values > CUTOFF * values[0]
    inverse = torch.where(kept, 1 / values, torch.zeros_like(values))
    solved = directions.T @ (inverse * (left.T @ right)) / scales
    smallest = values[-1].item()
    return solved, values[0].item() / smallest if smallest > 0 else math.inf


def _warnings(
    snapshots: Sequence[Snapshot],
    target: Snapshot | Weights,
    error: float,
    condition: float,
    amplification: float,
) -> list[str]:
    found = []
    if skipped := max(one.skipped for one in snapshots):
        found.append(
            f"the rows are not exact, because the snapshots skipped non-finite steps ({skipped} at most)"
        )
    newest = max(one.step for one in snapshots)
    beyond = _mass_after(target, newest)
    if beyond > 0:
        found.append(
            f"extrapolation: the target has {beyond:.1%} of its weight after step {newest}, the newest snapshot"
        )
    if error == math.inf:
        found.append("the target is the weights of its own step, and the snapshots cannot make these")
    elif error > MAX_ERROR:
        found.append(
            f"the predicted error is {error:.1%} of the distance between the target and the live weights;"
            " snapshots of more steps or rules would lower it"
        )
    if amplification > MAX_AMPLIFICATION:
        alike = " some of them are nearly combinations of others:" if condition > MAX_CONDITION else ""
        found.append(
            f"rounding errors of the snapshots can grow {amplification:.0f}-fold;{alike} use fewer snapshots"
        )
    return found


def _mass_after(target: Snapshot | Weights, step: int) -> float:
    """Return the share of the target's weight on later steps than this one."""
    total = 0.0
    for low, block in rows([target], target.step):
        if low <= step:
            return total + block[max(0, step + 1 - low) :].abs().sum().item()
        total += block.abs().sum().item()
    return total
