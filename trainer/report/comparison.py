"""Compare many runs: group them by their configurations, average each group over seeds, and find the best of all.

The winner of all groups is decided as follows. The weights with the best mean must have won in their own group: an
average must beat the live weights there, and the live weights must beat every average. Their value must also beat the
best weights of every other group over the seeds: by the paired t-test if both groups have the same seeds, else by
Welch's test. Beating all others means passing every one of these tests, so each is done at ALPHA without further
adjustment, even though the tested weights were chosen because they looked best (S. Gutmann and Z. Maymin, "Is the
selected population the best?", Ann. Statist. 15, 1987). Choosing the best weights within a group is paid for by
Bonferroni. With one seed per group no winner is named, because the variation over seeds is unknown.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from trainer.errors import listed
from trainer.report.format import direction_text, display_name, format_interval, format_p, format_value
from trainer.report.group import Group, common_direction
from trainer.report.headline import headline, no_direction_headline
from trainer.report.naming import group_runs
from trainer.report.runs import Run
from trainer.report.statistics import ALPHA, Estimate, paired_estimate, welch_estimate
from trainer.report.verdicts import Row, best_of, rows_of
from trainer.rundir.keys import LIVE

MAX_NAMES = 5
"""Most runs that a note lists by name."""


@dataclass(frozen=True)
class Comparison:
    """One metric over groups of runs."""

    metric: str
    runs: int
    """Number of runs that were given."""
    groups: list[Group]
    """Groups with an evaluation, without the runs that ended early."""
    rows: list[list[Row]]
    """Rows of each group, the live weights first."""
    winner: Row | None
    """The best row of all groups, if it is clearly the best."""
    headline: str
    notes: list[str]
    """Which runs were left out, and why."""

    @property
    def higher_is_better(self) -> bool | None:
        """Direction of the metric; None if no run declares it or the runs disagree."""
        return common_direction(self._directions)

    @property
    def disagree(self) -> bool:
        """Whether the runs declare different directions."""
        return len(self._directions) > 1

    @property
    def _directions(self) -> set[bool | None]:
        return {direction for group in self.groups for direction in group.directions(self.metric)}

    def ranked(self) -> list[int]:
        """Return the indices of the groups, the group with the best value first."""
        sign = -1.0 if self.higher_is_better else 1.0

        def cost(index: int) -> float:
            values = [sign * row.last.value for row in self.rows[index] if row.is_eligible]
            return min(values, default=math.inf)

        return sorted(range(len(self.groups)), key=cost)


def combine_all(runs: Sequence[Run]) -> list[list[Comparison]]:
    """Compare runs by every metric, the primary one first, separately for each primary metric, unit, task and data.

    Runs that differ in one of these cannot be ranked together.
    """
    scales: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        metric = run.primary_metric
        targets = (run.settings.get(key, "") for key in ("task._target_", "data._target_"))
        scales.setdefault((metric, run.with_unit(metric), *targets), []).append(run)
    results = []
    for comparable in scales.values():
        metrics = dict.fromkeys(
            [comparable[0].primary_metric, *(name for run in comparable for name in run.metrics)]
        )
        results.append([made for metric in metrics if (made := combine(comparable, metric)) is not None])
    return [comparisons for comparisons in results if comparisons]


def combine(runs: Sequence[Run], metric: str) -> Comparison | None:
    """Compare runs by one metric; None if no run has an evaluation of it.

    Args:
        runs: Runs that can be ranked together (see `combine_all`).
        metric: Name of an evaluated metric.
    """
    evaluated = [run for run in runs if metric in run.metrics]
    if not evaluated:
        return None
    groups = []
    missing = [run.name for run in runs if metric not in run.metrics]
    notes = [f"Not evaluated by {metric}: {listed(missing, MAX_NAMES)}."] if missing else []
    for group in group_runs(evaluated):
        complete, early = _drop_early_runs(group, metric)
        groups.append(complete)
        if early:
            notes.append(f"Left out because they ended earlier than other seeds: {listed(early, MAX_NAMES)}.")
    rows = [rows_of(group, metric) for group in groups]
    result = Comparison(metric, len(runs), groups, rows, None, "", notes)
    if len(groups) == 1:
        winner = next((row for row in rows[0] if row.last.winner), None)
        text = headline(rows[0], result.higher_is_better, disagree=result.disagree)
    elif result.higher_is_better is None:
        winner, text = None, no_direction_headline(metric, disagree=result.disagree)
    else:
        winner, text = _best_overall(groups, rows, metric, result.higher_is_better)
    return replace(result, winner=winner, headline=text)


def _drop_early_runs(group: Group, metric: str) -> tuple[Group, list[str]]:
    """Return the group without the runs whose last evaluation is earlier than that of others, and their names."""
    last_steps = [int(max(run.evaluation(LIVE, metric).steps, default=-1)) for run in group.runs]
    end = max(last_steps)
    kept = [index for index, step in enumerate(last_steps) if step == end]
    average_names = {
        (kept.index(index), name): text
        for (index, name), text in group.average_names.items()
        if index in kept
    }
    early = [
        f"{run.name} (step {step} of {end})"
        for run, step in zip(group.runs, last_steps, strict=True)
        if step < end
    ]
    return replace(group, runs=[group.runs[index] for index in kept], average_names=average_names), early


def _best_overall(
    groups: Sequence[Group], rows: Sequence[Sequence[Row]], metric: str, higher: bool
) -> tuple[Row | None, str]:
    """Return the clearly best row of all groups, if there is one, and the headline."""
    eligible = [[row for row in own if row.is_eligible] for own in rows]
    candidates = [(index, row) for index, own in enumerate(eligible) for row in own]
    top = best_of((row.last.value for _, row in candidates), higher)
    if top is None:
        return None, f"No winner by {metric}: no value is finite."
    best_group, best = next((index, row) for index, row in candidates if row.last.value == top)
    name = f"{display_name(best.weights)} of {groups[best_group].short_name}"
    subject = f"by {metric} ({direction_text(higher)}): {name}, {format_value(best.last.value)},"
    # (p-value, name of the group, its best row, difference), one for each other group.
    tests = []
    for group, own in zip(groups, eligible, strict=True):
        if group is not groups[best_group] and own:
            rival, gap = _compare_with_best_of(group, own, groups[best_group], best, higher)
            tests.append((len(rows[best_group]) * gap.p, group.short_name, rival, gap))
    if any(math.isnan(p) for p, *_ in tests):
        return (
            None,
            f"No clear winner {subject} is best, but its spread over seeds is unknown: it may be chance.",
        )
    p, against = 0.0, ""
    if tests:
        p, rival_group, rival, gap = max(tests, key=lambda test: test[0])
        against = (
            f" against {display_name(rival.weights)} of {rival_group}, {format_value(rival.last.value)}: "
            f"difference {format_interval(gap)}, p {format_p(min(1.0, p))}"
        )
    if not best.last.winner:
        return (
            None,
            f"No clear winner {subject} is best, but not clearly better than other weights of its own runs.",
        )
    if p > ALPHA:
        return None, f"No clear winner {subject} is best, but not clearly{against}."
    return best, f"Winner {subject}{against}."


def _compare_with_best_of(
    other: Group, rows: Sequence[Row], group: Group, best: Row, higher: bool
) -> tuple[Row, Estimate]:
    """Return the best row of another group, and the difference `best` minus that row over the seeds."""
    rival = (max if higher else min)(rows, key=lambda row: row.last.value)
    ours, theirs = _value_per_seed(group, best), _value_per_seed(other, rival)
    shared = [seed for seed in ours if seed in theirs]
    if len(shared) == len(ours) == len(theirs):
        return rival, paired_estimate(np.array([ours[seed] - theirs[seed] for seed in shared]))
    return rival, welch_estimate(np.array(list(ours.values())), np.array(list(theirs.values())))


def _value_per_seed(group: Group, row: Row) -> dict[str, float]:
    evaluations = group.evaluations(row.metric)
    column = int(np.searchsorted(evaluations.steps, row.last_step))
    values = evaluations.values[row.weights][:, column]
    return {
        seed: float(value) for seed, value in zip(group.seeds, values, strict=True) if not np.isnan(value)
    }
