"""Compare many runs: group them by their configurations, average each group over seeds, and find the best of all.

A single group has the verdict of its weights. Of several groups the report answers each question by itself
(`trainer.report.answers`). A winner of all groups is named if its group is clearly the best and its weights have won
there: an average must beat the live weights, and the live weights must beat every average.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from trainer.errors import listed
from trainer.report.answers import Answer, answers_of, leader_of
from trainer.report.earlier import Earlier, earlier_best
from trainer.report.group import Group, common_direction
from trainer.report.headline import headline, no_direction_headline
from trainer.report.naming import differing_settings, group_runs
from trainer.report.runs import Run, unfinished_note
from trainer.report.same_samples import by_samples
from trainer.report.verdicts import Row, rows_of
from trainer.rundir.keys import LIVE

MAX_NAMES = 5
"""Most runs that a note lists by name."""


@dataclass(frozen=True)
class Comparison:
    """One metric over groups of runs."""

    metric: str
    higher_is_better: bool | None
    """Direction of the metric; None if no run declares it or the runs disagree."""
    disagree: bool
    """Whether the runs declare different directions."""
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
    """Which runs were left out, are ranked elsewhere, are unfinished or count together."""
    answers: list[Answer]
    """With several groups: an answer to each question; the first one is the headline."""
    earlier: Earlier | None = None
    """With a single run: its weights of an earlier step, if these are clearly better."""

    def ranked(self) -> list[int]:
        """Return the indices of the groups, the group with the best value first."""
        sign = -1.0 if self.higher_is_better else 1.0

        def cost(index: int) -> float:
            values = [sign * row.last.value for row in self.rows[index] if row.is_eligible]
            return min(values, default=math.inf)

        return sorted(range(len(self.groups)), key=cost)

    def settings(self) -> list[str]:
        """Return the sorted keys of the settings in which the groups differ."""
        keys = differing_settings([group.runs[0] for group in self.groups])
        return [key for key in keys if not key.startswith("ema.")]

    def best_within(self, max_rows: float) -> list[int]:
        """Return the sorted indices of the best groups that have at most `max_rows` rows together; at least one."""
        ranked = self.ranked()
        totals = accumulate(len(self.rows[index]) for index in ranked)
        return sorted(ranked[: max(1, sum(total <= max_rows for total in totals))])


def combine_all(runs: Sequence[Run]) -> list[list[Comparison]]:
    """Compare runs by every metric, the primary one first, separately for each primary metric, unit, task and data.

    Runs that differ in one of these, or in the samples of their evaluations, cannot be ranked together.
    """
    scales: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        metric = run.primary_metric
        targets = (run.settings.get(key, "") for key in ("task._target_", "data._target_"))
        scales.setdefault((metric, run.with_unit(metric), *targets), []).append(run)
    results = []
    for metric, *others in scales:
        for comparable, apart in by_samples(scales[metric, *others], metric):
            metrics = dict.fromkeys([metric, *(name for run in comparable for name in run.metrics)])
            parts = ((part, name) for name in metrics for part in by_samples(comparable, name))
            made = (combine(own, name, notes=[*apart, *more]) for (own, more), name in parts)
            results.append([comparison for comparison in made if comparison is not None])
    return [comparisons for comparisons in results if comparisons]


def combine(runs: Sequence[Run], metric: str, notes: Sequence[str] = ()) -> Comparison | None:
    """Compare runs that can be ranked together (see `combine_all`) by one metric; None if no run is evaluated by it.

    `notes` come before the comparison's own.
    """
    evaluated = [run for run in runs if metric in run.metrics]
    if not evaluated:
        return None
    groups = []
    missing = [run.name for run in runs if metric not in run.metrics]
    notes = [*notes, *([f"Not evaluated by {metric}: {listed(missing, MAX_NAMES)}."] if missing else [])]
    for group in group_runs(evaluated):
        complete, early = _drop_early_runs(group, metric)
        groups.append(complete)
        if early:
            notes.append(f"Left out because they ended earlier than other seeds: {listed(early, MAX_NAMES)}.")
    notes += unfinished_note([run for group in groups for run in group.runs])
    forks = [[run.name for run in group.runs if run.fork] for group in groups]
    shared = [listed(names, MAX_NAMES) for names in forks if len(names) > 1]
    if shared:
        more = f"; and those of {len(shared) - MAX_NAMES} more settings" if len(shared) > MAX_NAMES else ""
        names = "; ".join(shared[:MAX_NAMES]) + more
        notes.append(f"Forks of one run share its steps, so they count as one seed: {names}.")
    rows = [rows_of(group, metric) for group in groups]
    directions = {direction for group in groups for direction in group.directions(metric)}
    higher, disagree = common_direction(directions), len(directions) > 1
    winner: Row | None = None
    answers: list[Answer] = []
    earlier = earlier_best(evaluated[0], metric) if len(evaluated) == 1 else None
    if len(groups) == 1:
        winner = next((row for row in rows[0] if row.last.winner), None)
        text = headline(rows[0], higher, split=evaluated[0].split(metric), disagree=disagree)
        text = f"{text} {earlier.sentence}" if earlier else text
    elif higher is None:
        text = no_direction_headline(metric, disagree=disagree)
    else:
        winner, answers = _best_overall(groups, rows, metric, higher)
        text = str(answers[0])
    return Comparison(
        metric, higher, disagree, len(runs), groups, rows, winner, text, notes, answers, earlier
    )


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
) -> tuple[Row | None, list[Answer]]:
    """Return the clearly best row of all groups, if there is one, and an answer to each question."""
    leader = leader_of(groups, rows, higher)
    if leader is None:
        return None, [Answer(f"No winner by {metric}", "no value is finite")]
    winner = leader.row if leader.is_clear and leader.row.last.winner else None
    return winner, answers_of(leader)
