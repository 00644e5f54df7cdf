"""Eliminate averages of a bank early: all are evaluated on a first part of the samples, few on all of them.

A race (O. Maron and A. W. Moore, "Hoeffding Races", NIPS 1993) compares, after each part, every average with the best
one so far by the differences on the same samples. An average that is surely not better is eliminated, and the number
of samples is doubled. The test is Student's t of paired differences, as in M. Birattari et al., "A Racing Algorithm
for Configuring Metaheuristics", GECCO 2002.

*The winner to find* is the average that is best on all samples of the evaluation. The parts are drawn from these
without replacement (the order is one fixed permutation), so the error of a mean of n out of N samples has the factor
sqrt(1 - n / N) of a finite population (W. G. Cochran, "Sampling Techniques", 3rd ed., 1977, section 2.6).

*The error.* ALPHA is spent in equal shares over the evaluations of the run that are raced, over the parts, and over the
pairs of the best average with each other one (Bonferroni). Thus the probability that any race of a run eliminates an
average that is clearly better than its winner is at most ALPHA.

*Clearly better* means: by more than one standard error of the winner's gap to the live weights on all samples. Two
averages that are closer change the reported gap by less than its own error, so the race may drop either.

*The cost.* A bank of 10 in the quickstart with 256 samples costs 2.65 to 2.73 times the live weights. 2.0 are the live
weights and the winner, 0.28 is the first part. The rest is the price of the error bound: without the share over the
pairs, or without that over the parts, the cost is 2.5; without both it is 2.36, with another winner in up to 5 % of
evaluations. Other first parts (4 to 16 samples), growths (1.25 to 2) and uneven shares change it by less than 0.1.

A part whose differences are all equal has no error to judge by, so it eliminates nothing. A value that is not finite
eliminates its average at once, because its mean over all samples is not finite either.
"""

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass

import numpy as np

from trainer.config.schema import TrainerConfig
from trainer.errors import ConfigError
from trainer.evaluation.custom import CustomMetric, is_higher_better
from trainer.protocols import Task
from trainer.report.statistics import ALPHA, t_quantile
from trainer.rundir.keys import LIVE
from trainer.rundir.pairs import Array

FIRST = 8
"""Least number of samples of the first part; the variance of fewer differences is too uncertain."""
DOUBLINGS = 6
"""Most doublings from the first part to all samples."""


@dataclass(frozen=True)
class Race:
    """Rule by which averages are eliminated in the evaluations of a run."""

    metric: str
    """Metric that decides: the primary one, with one value per sample."""
    higher_is_better: bool
    evaluations: int
    """Number of raced evaluations of the whole run, at least 1."""

    def refuse_without(self, values: Container[str]) -> None:
        """Refuse a race whose metric has no value of each sample.

        Args:
            values: names of the metrics with one value per sample.

        Raises:
            ConfigError: The metric is not among them.
        """
        if self.metric not in values:
            raise ConfigError(
                f"trainer.eval_policy: expected full, because the primary metric {self.metric} has no value of each"
                " sample to race by"
            )

    def survivors(self, values: Mapping[str, Array], total: int, rivals: int) -> list[str]:
        """Return the averages that may still be the best on all samples; at least one.

        Args:
            values: values `[n]` of the metric by name of the averages still in the race, and of the live weights, on
                the first n samples.
            total: number of all samples, more than n.
            rivals: number of the averages at the start of the race, less one.
        """
        sign = -1.0 if self.higher_is_better else 1.0
        costs = {name: sign * own for name, own in values.items() if name != LIVE}
        finite = {name: own for name, own in costs.items() if np.isfinite(own).all()}
        if not finite:
            return list(costs)
        leader = min(finite, key=lambda name: float(finite[name].mean()))
        tolerance = _standard_error(sign * values[LIVE] - finite[leader], total) if LIVE in values else 0.0
        shares = self.evaluations * (len(parts_of(total)) - 1) * max(1, rivals)
        # t_quantile is two-sided, and only worse averages are eliminated.
        count = len(finite[leader])
        limit = t_quantile(2 * ALPHA / shares, count - 1) * math.sqrt(1 - count / total)
        rounding = 1e-12 * float(np.abs(finite[leader]).mean())
        return [
            name
            for name, own in finite.items()
            if name == leader or not _is_worse(own - finite[leader], limit, tolerance, rounding)
        ]


def _standard_error(differences: Array, count: int) -> float:
    """Return the standard error of a mean over `count` samples that differ as these do; 0 if they are not finite."""
    return float(differences.std(ddof=1)) / math.sqrt(count) if np.isfinite(differences).all() else 0.0


def _is_worse(excess: Array, limit: float, tolerance: float, rounding: float) -> bool:
    error = float(excess.std(ddof=1)) / math.sqrt(len(excess))
    return error > rounding and float(excess.mean()) + tolerance > limit * error


def race_of(settings: TrainerConfig, task: Task, metrics: Mapping[str, CustomMetric]) -> Race | None:
    """Return the rule of `trainer.eval_policy=race`; None without it, and if only the last step is evaluated."""
    evaluations = (settings.steps - 1) // settings.eval_every
    if settings.eval_policy != "race" or not evaluations:
        return None
    metric = task.primary_metric
    return Race(metric, bool(is_higher_better(metric, task, metrics)), evaluations)


def parts_of(count: int) -> list[int]:
    """Return the numbers of samples after which a race eliminates averages, doubling; the last one is `count`."""
    ends, end = [], max(FIRST, -(-count // 2**DOUBLINGS))
    while end < count:
        ends.append(end)
        end *= 2
    return [*ends, count]
