"""Runs that train the same thing with different seeds, as arrays over seeds and evaluation steps."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.report.runs import LIVE, Run
from trainer.rundir.records import Series

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Evaluations:
    """One metric of all weights of a group. NaN: nothing logged; infinity: logged, and not a finite number."""

    steps: NDArray[np.int64]
    """`[n]`, rising: all at which some seed was evaluated."""
    values: dict[str, Array]
    """`[seeds, n]` by weights, the live ones first."""
    gaps: dict[str, Array]
    """Live minus average on the same samples, as logged; none for the live weights."""
    errors: dict[str, Array]
    """Standard errors of the gaps over the samples."""


@dataclass(frozen=True)
class Group:
    """Runs of one training; a single run is a group of one.

    The averages do not act on the training: runs that differ in `ema` alone are the same live weights, watched by
    different averages.
    """

    name: str
    runs: list[Run]
    """At least one."""
    average_names: Mapping[tuple[int, str], str] = field(default_factory=dict)
    """For (place of a run, name of an average) another name, where one name stands for several averages."""
    short_settings: Mapping[str, str] = field(default_factory=dict)
    """What tells it from other groups, keys and values as short as they may be; empty for a group alone."""

    name_is_partial: bool = False
    """Whether it differs from other groups in more than its name tells."""

    @property
    def short_name(self) -> str:
        """Its name where there is little room: what tells it apart, never cut."""
        return ", ".join(f"{key}={value}" for key, value in self.short_settings.items()) or self.name

    @cached_property
    def seeds(self) -> list[str]:
        """Seeds, in the order of the runs. A run that tells none counts as a seed of its own."""
        return list(dict.fromkeys(self._seed(place) for place in range(len(self.runs))))

    @cached_property
    def averages(self) -> list[str]:
        """Names of the averages, in the order in which they were logged."""
        return list(dict.fromkeys(label for label, _, _ in self._members()))

    @property
    def metrics(self) -> list[str]:
        """Names of the evaluated metrics, the primary one first."""
        return list(dict.fromkeys(metric for run in self.runs for metric in run.metrics))

    @property
    def primary_metric(self) -> str:
        """The metric that decides who won."""
        return self.runs[0].primary_metric

    def with_unit(self, metric: str) -> str:
        """`metric` with its unit."""
        return self.runs[0].with_unit(metric)

    def higher_is_better(self, metric: str) -> bool | None:
        """Direction of a metric; None if nobody said, or not all runs that have it say the same."""
        return common_direction(self.directions(metric))

    def directions(self, metric: str) -> set[bool | None]:
        """What the runs that have a metric say of its direction: several things if they disagree."""
        having = [run for run in self.runs if metric in run.metrics] or self.runs
        return {run.higher_is_better(metric) for run in having}

    def evaluations(self, metric: str) -> Evaluations:
        """All evaluations of `metric`; weights without one are left out. Made once: tables and pictures ask again."""
        if metric not in self._evaluated:
            self._evaluated[metric] = self._evaluate(metric)
        return self._evaluated[metric]

    @cached_property
    def _evaluated(self) -> dict[str, Evaluations]:
        return {}

    def _evaluate(self, metric: str) -> Evaluations:
        curves = {LIVE: [(place, run.evaluation(LIVE, metric)) for place, run in enumerate(self.runs)]}
        gaps: dict[str, list[tuple[int, Series]]] = {}
        errors: dict[str, list[tuple[int, Series]]] = {}
        for label, place, name in self._members():
            run = self.runs[place]
            gap, error = run.gap(name, metric)
            curves.setdefault(label, []).append((place, run.evaluation(name, metric)))
            gaps.setdefault(label, []).append((place, gap))
            errors.setdefault(label, []).append((place, error))
        logged = [curve.steps for found in curves.values() for _, curve in found]
        steps = max(logged, key=len)
        if not all(np.array_equal(steps, others) for others in logged):
            steps = np.unique(np.concatenate(logged))
        kept = [label for label, found in curves.items() if any(len(curve.steps) for _, curve in found)]
        return Evaluations(
            steps,
            {label: self._matrix(curves[label], steps) for label in kept},
            {label: self._matrix(gaps[label], steps) for label in kept if label != LIVE},
            {label: self._matrix(errors[label], steps) for label in kept if label != LIVE},
        )

    def tracked(self, key: str) -> dict[str, Series]:
        """Mean over the seeds of `ema/<name>/<key>`, finite values only, of the averages that have any."""
        found: dict[str, list[tuple[int, Series]]] = {}
        for label, place, name in self._members():
            found.setdefault(label, []).append((place, self.runs[place].series(f"ema/{name}/{key}").finite()))
        means = {}
        for label, curves in found.items():
            steps = np.unique(np.concatenate([curve.steps for _, curve in curves]))
            if len(steps):
                means[label] = Series(steps, mean_over_seeds(self._matrix(curves, steps)))
        return means

    @cached_property
    def horizons(self) -> dict[str, float]:
        """1 / (1 - decay) of each average that has one, in optimizer steps, with the decay in force at the end.

        A rule that varies it logs it as `ema/<name>/decay`.
        """
        every = {label: self.runs[place].update_every(name) for label, place, name in self._members()}
        last = {label: float(curve.values[-1]) for label, curve in self.tracked("decay").items()}
        of_step = {label: decay ** (1 / every[label]) for label, decay in last.items() if decay >= 0}
        return {label: 1 / (1 - decay) for label, decay in of_step.items() if decay < 1}

    def sources(self, weights: str) -> set[tuple[Path, str]]:
        """The weights that a row of the group is of, whatever they are called here: (run directory, name in it)."""
        if weights == LIVE:
            return {(run.path, LIVE) for run in self.runs}
        return {(self.runs[place].path, name) for label, place, name in self._members() if label == weights}

    def _members(self) -> Iterable[tuple[str, int, str]]:
        """(label, place of a run, name in it) of all averages."""
        for place, run in enumerate(self.runs):
            for name in run.averages:
                yield self.average_names.get((place, name), name), place, name

    @cached_property
    def _seed_rows(self) -> list[int]:
        """For each run the place of its seed."""
        return [self.seeds.index(self._seed(place)) for place in range(len(self.runs))]

    def _seed(self, place: int) -> str:
        return self.runs[place].settings.get("seed", f"run {place}")

    def _matrix(self, curves: Sequence[tuple[int, Series]], steps: NDArray[np.int64]) -> Array:
        """`[seeds, steps]`. Two runs of one seed are no two samples: their mean is one."""
        if len(self.runs) == 1 and len(curves[0][1].steps) == len(steps):
            return np.where(np.isnan(curves[0][1].values), np.inf, curves[0][1].values)[None]
        total, count = np.zeros((2, len(self.seeds), len(steps)))
        for place, curve in curves:
            row, columns = self._seed_rows[place], np.searchsorted(steps, curve.steps)
            total[row, columns] += np.where(np.isnan(curve.values), np.inf, curve.values)
            count[row, columns] += 1
        return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def common_direction(directions: Set[bool | None]) -> bool | None:
    """The direction that all tell; None if there is none such."""
    return next(iter(directions)) if len(directions) == 1 else None


def mean_over_seeds(values: Array) -> Array:
    """`[n]` of `[seeds, n]`: mean of the seeds that logged something; NaN where none did, infinity where one broke."""
    there = ~np.isnan(values)
    total = np.where(there, values, 0.0).sum(axis=0)
    count = there.sum(axis=0)
    return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
