"""Collect the values of runs that differ only in their seed into arrays over seeds and evaluation steps."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.report.runs import Run
from trainer.rundir.columns import Series
from trainer.rundir.keys import LIVE, average_key, gap_error_key, gap_key, raced_samples_key

Array = NDArray[np.float64]
Curves = Sequence[tuple[int, Series]]
"""Pairs of the index of a run and a series of it."""


@dataclass(frozen=True)
class Evaluations:
    """One metric for all weights of a group. NaN: nothing logged; infinity: the logged value was not finite."""

    steps: NDArray[np.int64]
    """`[n]`, increasing: all steps at which some seed was evaluated."""
    values: dict[str, Array]
    """`[seeds, n]` for each weights, the live weights first."""
    gaps: dict[str, Array]
    """`[seeds, n]` for each average: live minus average on the same samples, as logged."""
    run_gaps: dict[str, Array]
    """`[runs, n]`: those of each run, whose mean over the runs of a seed is in `gaps`."""
    run_errors: dict[str, Array]
    """Standard errors of `run_gaps` over the samples."""
    seed_of_run: NDArray[np.int64]
    """`[runs]`: index of the seed of each run."""


@dataclass(frozen=True)
class Group:
    """Runs of one training with different seeds; a single run is a group of one.

    Averages do not change the training. Runs that differ only in `ema` therefore have the same live weights and
    different averages of them.
    """

    name: str
    runs: list[Run]
    """At least one run."""
    average_names: Mapping[tuple[int, str], str] = field(default_factory=dict)
    """New name by (index of the run, name of the average), where one name is used for several configurations."""
    short_settings: Mapping[str, str] = field(default_factory=dict)
    """Shortened keys and values that distinguish the group from the others; empty for a single group."""
    name_is_partial: bool = False
    """Whether the group differs from others in more settings than its name contains."""
    _cache: dict[str, Evaluations] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def short_name(self) -> str:
        """Name for narrow places: the shortened settings, or the full name if there are none."""
        return ", ".join(f"{key}={value}" for key, value in self.short_settings.items()) or self.name

    @cached_property
    def run_seeds(self) -> list[str]:
        """Seed of each run; a run without a recorded seed gets one of its own.

        Forks of one run share its steps. So they are no independent trainings, and their `fork` is their only seed.
        """
        own = [run.settings.get("seed", f"run {index}") for index, run in enumerate(self.runs)]
        return [run.fork or seed for run, seed in zip(self.runs, own, strict=True)]

    @property
    def has_forks(self) -> bool:
        """Whether runs of it are forks, whose number adds no seed."""
        return any(run.fork for run in self.runs)

    @cached_property
    def seeds(self) -> list[str]:
        """Distinct seeds, in the order of the runs."""
        return list(dict.fromkeys(self.run_seeds))

    @cached_property
    def averages(self) -> list[str]:
        """Names of the averages, in the order in which they were logged."""
        return list(dict.fromkeys(name for name, _, _ in self._members()))

    def with_unit(self, metric: str) -> str:
        """Return `metric` followed by its unit, if it has one."""
        return self.runs[0].with_unit(metric)

    def higher_is_better(self, metric: str) -> bool | None:
        """Return the direction of a metric; None if no run declares it or the runs disagree."""
        return common_direction(self.directions(metric))

    def directions(self, metric: str) -> set[bool | None]:
        """Return the distinct directions that the runs with this metric declare."""
        runs = [run for run in self.runs if metric in run.metrics] or self.runs
        return {run.higher_is_better(metric) for run in runs}

    def evaluations(self, metric: str) -> Evaluations:
        """Return all evaluations of `metric`, without weights that have none; cached for later calls."""
        if metric not in self._cache:
            self._cache[metric] = self._evaluate(metric)
        return self._cache[metric]

    def _evaluate(self, metric: str) -> Evaluations:
        live = {LIVE: [(index, run.evaluation(LIVE, metric)) for index, run in enumerate(self.runs)]}
        curves = live | self._curves(lambda run, name: run.evaluation(name, metric))
        run_gaps = self._curves(lambda run, name: run.series(gap_key(name, metric)))
        run_errors = self._curves(lambda run, name: run.series(gap_error_key(name, metric)))
        logged = [curve.steps for pairs in curves.values() for _, curve in pairs]
        steps = max(logged, key=len)
        if not all(np.array_equal(steps, others) for others in logged):
            steps = np.unique(np.concatenate(logged))
        values = {name: self._seed_matrix(pairs, steps) for name, pairs in curves.items()}
        for name, raced in self._curves(lambda run, name: run.series(raced_samples_key(name))).items():
            for (_, race), (_, evaluated) in zip(raced, curves[name], strict=True):
                if len(race.steps):  # a mean over the other seeds only would be that of a selection
                    values[name][:, np.isin(steps, np.setdiff1d(race.steps, evaluated.steps))] = np.nan
        values = {name: own for name, own in values.items() if not np.isnan(own).all()}
        averages = [name for name in values if name != LIVE]
        return Evaluations(
            steps,
            values,
            {
                name: np.where(np.isnan(values[name]), np.nan, self._seed_matrix(run_gaps[name], steps))
                for name in averages
            },
            {name: self._run_matrix(run_gaps[name], steps) for name in averages},
            {name: self._run_matrix(run_errors[name], steps) for name in averages},
            np.array([self.seeds.index(seed) for seed in self.run_seeds]),
        )

    def _curves(self, series: Callable[[Run, str], Series]) -> dict[str, Curves]:
        """Return for each average the series that its runs have, each by the name of the average in that run."""
        curves = defaultdict(list)
        for name, index, logged_name in self._members():
            curves[name].append((index, series(self.runs[index], logged_name)))
        return dict(curves)

    def tracked(self, key: str) -> dict[str, Series]:
        """Return the mean over the seeds of the finite values of `ema/<name>/<key>`, for each average with a value."""
        tracked = self._curves(lambda run, name: run.series(average_key(name, key)).finite())
        means = {}
        for name, curves in tracked.items():
            steps = np.unique(np.concatenate([curve.steps for _, curve in curves]))
            if len(steps):
                means[name] = Series(steps, mean_over_seeds(self._seed_matrix(curves, steps)))
        return means

    def average_names_of(self, index: int) -> dict[str, str]:
        """Return the names in the group of the averages of a run, by their names in the run."""
        return {logged: name for name, run, logged in self._members() if run == index}

    @cached_property
    def horizons(self) -> dict[str, float]:
        """1 / (1 - decay) in optimizer steps, from the last logged decay `ema/<name>/decay`, for each average."""
        every = {name: self.runs[index].update_every(logged) for name, index, logged in self._members()}
        last = {name: float(curve.values[-1]) for name, curve in self.tracked("decay").items()}
        per_step = {name: decay ** (1 / every[name]) for name, decay in last.items() if decay >= 0}
        return {name: 1 / (1 - decay) for name, decay in per_step.items() if decay < 1}

    def sources(self, weights: str) -> set[tuple[Path, str]]:
        """Return (run directory, name in that run) of all weights that `weights` of this group combines."""
        if weights == LIVE:
            return {(run.path, LIVE) for run in self.runs}
        return {(self.runs[index].path, logged) for name, index, logged in self._members() if name == weights}

    def _members(self) -> Iterable[tuple[str, int, str]]:
        """Yield (name in the group, index of the run, name in the run) for all averages."""
        for index, run in enumerate(self.runs):
            for name in run.averages:
                yield self.average_names.get((index, name), name), index, name

    def _seed_matrix(self, curves: Curves, steps: NDArray[np.int64]) -> Array:
        """Return `[seeds, steps]` from (index of the run, curve), averaging runs of the same seed into one sample."""
        runs = self._run_matrix(curves, steps)
        if len(self.seeds) == len(self.runs):
            return runs
        seed_of_run = np.array(self.run_seeds)
        return np.stack([mean_over_seeds(runs[seed_of_run == seed]) for seed in self.seeds])

    def _run_matrix(self, curves: Curves, steps: NDArray[np.int64]) -> Array:
        """Return `[runs, steps]` from (index of the run, curve)."""
        found = np.full((len(self.runs), len(steps)), np.nan)
        for index, curve in curves:
            found[index, np.searchsorted(steps, curve.steps)] = _nan_to_inf(curve.values)
        return found


def _nan_to_inf(values: Array) -> Array:
    """Mark logged values that are not finite, because NaN means "nothing logged" here."""
    return np.where(np.isnan(values), np.inf, values)


def common_direction(directions: Set[bool | None]) -> bool | None:
    """Return the direction if there is exactly one, else None."""
    return next(iter(directions)) if len(directions) == 1 else None


def mean_over_seeds(values: Array) -> Array:
    """Return the mean `[n]` of `[seeds, n]` over the seeds that logged a value; NaN if none did."""
    logged = ~np.isnan(values)
    total = np.where(logged, values, 0.0).sum(axis=0)
    count = logged.sum(axis=0)
    return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
