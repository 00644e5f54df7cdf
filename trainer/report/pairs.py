"""Compare any two weights of a group at its last evaluation, by differences on the same samples or seeds.

A single run has the moments of its samples in `pairs.jsonl`; of several seeds, each seed is one sample. Several runs of
one seed have those of each (`trainer.report.statistics.one_seed_estimate`). A run of an earlier version has no moments.
Then only the gaps to the live weights are logged, and the standard error of the difference of two gaps is at most the
sum of theirs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.report.group import Group
from trainer.report.statistics import ALPHA, Estimate, one_seed_estimate, t_quantile
from trainer.rundir.keys import raced, raced_samples_key
from trainer.rundir.pairs import Moments

Z_POWER = 0.841621
"""Normal quantile of a power of 80 %."""
MOST_ERRORS = 1e100
"""Ratio of a standard error to a difference from which the number would overflow; it counts as infinite."""


@dataclass(frozen=True)
class Rival:
    """The average that is hardest to separate from the best one."""

    weights: str
    gap: Estimate
    """This average minus the best one."""


def moments_of(group: Group, metric: str, step: int, names: Sequence[str]) -> Moments | None:
    """Return the moments of these weights at one evaluation, by their names in the group; None if the run has none.

    All of the weights were evaluated at this step. Those without a finite value are left out.
    """
    evaluations = group.evaluations(metric)
    column = int(np.searchsorted(evaluations.steps, step))
    values = {name: evaluations.values[name][:, column] for name in names}
    if len(group.seeds) > 1:
        shared = ~np.isnan(np.stack(list(values.values()))).any(axis=0) if values else np.zeros(0, dtype=bool)
        return Moments.of({name: own[shared] for name, own in values.items()})
    moments = _moments_of_run(group, 0, metric, step, names) if len(group.runs) == 1 else None
    return moments and (further_moments(group, metric, step, names) or moments)


def moments_of_each(group: Group, metric: str, step: int, names: Sequence[str]) -> list[Moments]:
    """Return the result of `moments_of`, or for several runs of one seed the moments of each; [] if one has none."""
    if len(group.seeds) > 1 or len(group.runs) == 1:
        every = [moments_of(group, metric, step, names)]
    else:
        every = [_moments_of_run(group, index, metric, step, names) for index in range(len(group.runs))]
    found = [moments for moments in every if moments is not None]
    return found if len(found) == len(every) else []


def _moments_of_run(group: Group, index: int, metric: str, step: int, names: Sequence[str]) -> Moments | None:
    """Return the moments of one run; further arguments and None as for `moments_of`."""
    run, new_names = group.runs[index], group.average_names_of(index)
    if run.pairs is None or run.pairs.step != step or metric not in run.pairs.metrics:
        return None
    moments = run.pairs.metrics[metric].renamed(new_names).only(names)
    if moments is None:
        return None
    own = {new: logged for logged, new in new_names.items()}
    curves = [run.evaluation(own.get(name, name), metric) for name in moments.weights]
    logged = [dict(curve.pairs()).get(step, math.nan) for curve in curves]
    # An earlier version that continued the run has replaced the records only.
    return moments if np.allclose(moments.means, logged, rtol=1e-9, atol=1e-12) else None


def further_moments(group: Group, metric: str, step: int, names: Sequence[str]) -> Moments | None:
    """Return the moments of a single run on the further samples of its last evaluation; None without any.

    Runs that are compared with others have none: their numbers of further samples differ, so all are compared by the
    first samples, which are the same.
    """
    pairs = group.runs[0].pairs if len(group.runs) == 1 and not group.short_settings else None
    if pairs is None or pairs.step != step or metric not in pairs.further:
        return None
    return pairs.further[metric].renamed(group.average_names_of(0)).only(names)


@dataclass(frozen=True)
class Eliminated:
    """An average that a race eliminated at an evaluation."""

    weights: str
    samples: int
    """Number of samples after which it was eliminated."""
    gap: Estimate | None
    """It minus the best average, on these samples; None without the pairs of this evaluation."""


def eliminated_at(group: Group, metric: str, step: int) -> list[Eliminated]:
    """Return the averages that a race by `metric` eliminated at an evaluation of a single run; several have none."""
    if len(group.runs) > 1:
        return []
    run, found = group.runs[0], []
    values = {name: dict(run.evaluation(name, metric).pairs()).get(step) for name in run.averages}
    left = {name: value for name, value in values.items() if value is not None}
    sign = -1.0 if run.higher_is_better(metric) else 1.0
    finite = [name for name, value in left.items() if math.isfinite(value)]
    best = min(finite, key=lambda name: sign * left[name], default=None)
    pairs = run.pairs if run.pairs is not None and run.pairs.step == step else None
    for name in raced(run.columns):
        samples = dict(run.series(raced_samples_key(name)).pairs()).get(step)
        if samples is None or name in left:
            continue
        gap = None
        if pairs and best is not None and (moments := pairs.common(metric, name, best)):
            gap = difference(moments, name, best)
        found.append(Eliminated(group.average_names_of(0).get(name, name), int(samples), gap))
    return found


def difference(moments: Moments, one: str, other: str) -> Estimate:
    """Estimate the mean of `one` minus `other` over the samples or seeds."""
    mean, se = moments.contrast({one: 1.0, other: -1.0})
    return Estimate(mean, se, moments.count - 1)


def difference_over_runs(runs: Sequence[Moments], one: str, other: str) -> Estimate | None:
    """Estimate the difference by the moments of each run with both weights (`moments_of_each`); None without any."""
    gaps = [difference(own, one, other) for own in runs if {one, other} <= set(own.weights)]
    if len(gaps) < 2:
        return gaps[0] if gaps else None
    means, errors = (np.array([getattr(gap, name) for gap in gaps]) for name in ("mean", "se"))
    return one_seed_estimate(means, errors, gaps[0].df + 1)


def not_excluded(rivals: Mapping[str, Estimate]) -> set[str]:
    """Return the averages that may be as good as the best observed one, by their differences to it.

    See `trainer.report.statistics`.
    """
    if all(gap.p <= ALPHA for gap in rivals.values()):
        return set()
    return {name for name, gap in rivals.items() if not gap.p * len(rivals) <= ALPHA}


def closest(rivals: Mapping[str, Estimate]) -> Rival | None:
    """Return the rival with the largest p-value; None without rivals whose difference has an error."""
    tested = [Rival(name, gap) for name, gap in rivals.items() if not math.isnan(gap.p)]
    return max(tested, key=lambda rival: rival.gap.p, default=None)


def needed(gap: Estimate, alpha: float = ALPHA, count: float | None = None) -> float:
    """Return how many samples, or seeds, show a difference of the observed size with 80 % power.

    Infinite without a difference, and NaN if there is no test or the number of samples is unknown.

    The smallest n with n >= m (t + z)² (SE / difference)², where t is the quantile of Student's t with n - 1
    degrees of freedom for a two-sided test at level alpha, z the normal quantile of 0.8, and m the present number.

    Args:
        gap: difference seen, with its standard error.
        alpha: level of the test.
        count: present number of samples or seeds (in each group); None takes that of a paired difference.
    """
    if math.isnan(gap.p) or not math.isfinite(gap.df):
        return math.nan
    if not gap.mean:
        return math.inf
    ratio = gap.se / abs(gap.mean)
    if ratio > MOST_ERRORS:
        return math.inf
    scale = (gap.df + 1 if count is None else count) * ratio**2
    number = max(2.0, float(math.ceil(scale * (t_quantile(alpha, math.inf) + Z_POWER) ** 2)))
    while number < scale * (t_quantile(alpha, number - 1) + Z_POWER) ** 2:
        number += 1
    return number
