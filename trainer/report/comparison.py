"""Many runs in one table: grouped by what differs between their configurations, seeds within a group averaged.

Who is best of all groups is decided like this. The line with the best mean must have won its own group (it beats the
live weights there, or is the live weights), and its value must beat the best line of every other group over the
seeds: by the paired t test where both have the same seeds, else by Welch's. To beat all others is an intersection of
claims, so each is tested at ALPHA without further adjustment, and the one that looked best may be put to that test (S.
Gutmann and Z. Maymin, "Is the selected population the best?", Ann. Statist. 15, 1987); that a line is the best of the
several of its group is paid for by Bonferroni. With one seed a group nothing is claimed: how much another seed would
change is unknown.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np

from trainer.report.group import Group, common_direction
from trainer.report.naming import differing_settings, group_runs
from trainer.report.runs import LIVE, Run
from trainer.report.statistics import ALPHA, Estimate, paired_estimate, welch_estimate
from trainer.report.text.table import (
    Line,
    Table,
    direction_text,
    display_name,
    file_only_columns,
    format_interval,
    format_p,
    format_value,
    headline,
    no_direction_headline,
    row_cells,
    row_headers,
    row_notes,
)
from trainer.report.verdicts import Row, best_of, rows_of

MAX_NAMES = 5
"""Runs that a note names one by one."""


@dataclass(frozen=True)
class Comparison:
    """One metric over groups of runs."""

    metric: str
    runs: int
    """How many there were."""
    groups: list[Group]
    """Those with an evaluation, without the runs that ended early."""
    rows: list[list[Row]]
    """Of each group, the live weights first."""
    winner: Row | None
    """The best line of all, if it is clearly the best."""
    headline: str
    notes: list[str]
    """What was left out, and why."""

    @property
    def higher_is_better(self) -> bool | None:
        """Direction of the metric; None if nobody said, or not all say the same."""
        return common_direction(self._directions)

    @property
    def disagree(self) -> bool:
        """Whether that is so because the runs say different things of it."""
        return len(self._directions) > 1

    @property
    def _directions(self) -> set[bool | None]:
        return {told for group in self.groups for told in group.directions(self.metric)}

    def ranked(self) -> list[int]:
        """Places of the groups, the one with the best value first."""
        sign = -1.0 if self.higher_is_better else 1.0

        def cost(place: int) -> float:
            values = [sign * row.last.value for row in self.rows[place] if row.is_eligible]
            return min(values, default=math.inf)

        return sorted(range(len(self.groups)), key=cost)


def combine_all(runs: Sequence[Run]) -> list[list[Comparison]]:
    """The comparisons of each scale, that is of runs of one primary metric, task and data, which alone can be ranked.

    There is one by each metric, the primary one first.
    """
    scales: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        metric = run.primary_metric
        targets = (run.settings.get(key, "") for key in ("task._target_", "data._target_"))
        scales.setdefault((metric, run.with_unit(metric), *targets), []).append(run)
    found = []
    for together in scales.values():
        metrics = dict.fromkeys(
            [together[0].primary_metric, *(name for run in together for name in run.metrics)]
        )
        found.append([made for metric in metrics if (made := combine(together, metric)) is not None])
    return [comparisons for comparisons in found if comparisons]


def combine(runs: Sequence[Run], metric: str) -> Comparison | None:
    """Compare runs by one metric; None if none has an evaluation of it.

    Args:
        runs: Runs of one scale (`combine_all`).
        metric: Name of an evaluated metric.
    """
    evaluated = [run for run in runs if metric in run.metrics]
    if not evaluated:
        return None
    groups = []
    missing = [run.name for run in runs if metric not in run.metrics]
    notes = [f"Not evaluated by {metric}: {_listed(missing)}."] if missing else []
    for group in group_runs(evaluated):
        whole, early = _drop_early_runs(group, metric)
        groups.append(whole)
        if early:
            notes.append(f"Left out, for they ended earlier than other seeds: {_listed(early)}.")
    rows = [rows_of(group, metric) for group in groups]
    found = Comparison(metric, len(runs), groups, rows, None, "", notes)
    if len(groups) == 1:
        winner = next((row for row in rows[0] if row.last.winner), None)
        told = headline(rows[0], found.higher_is_better, disagree=found.disagree)
        return replace(found, winner=winner, headline=told)
    if found.higher_is_better is None:
        return replace(found, headline=no_direction_headline(metric, disagree=found.disagree))
    winner, told = _best_overall(groups, rows, metric, found.higher_is_better)
    return replace(found, winner=winner, headline=told)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def _drop_early_runs(group: Group, metric: str) -> tuple[Group, list[str]]:
    reached = [int(max(run.evaluation(LIVE, metric).steps, default=-1)) for run in group.runs]
    kept = [place for place, step in enumerate(reached) if step == max(reached)]
    average_names = {
        (kept.index(place), name): told
        for (place, name), told in group.average_names.items()
        if place in kept
    }
    early = [
        f"{run.name} (step {step} of {max(reached)})"
        for run, step in zip(group.runs, reached, strict=True)
        if step < max(reached)
    ]
    return replace(group, runs=[group.runs[place] for place in kept], average_names=average_names), early


def _best_overall(
    groups: Sequence[Group], rows: Sequence[Sequence[Row]], metric: str, higher: bool
) -> tuple[Row | None, str]:
    contenders = [[row for row in own if row.is_eligible] for own in rows]
    lines = [(place, row) for place, own in enumerate(contenders) for row in own]
    top = best_of((row.last.value for _, row in lines), higher)
    if top is None:
        return None, f"No winner by {metric}: no value is finite."
    place, best = next((place, row) for place, row in lines if row.last.value == top)
    name = f"{display_name(best.weights)} of {groups[place].short_name}"
    told = f"by {metric} ({direction_text(higher)}): {name}, {format_value(best.last.value)},"
    others = [n for n in range(len(groups)) if n != place and contenders[n]]
    met = [(n, *_compare_with_best_of(groups[place], best, groups[n], contenders[n], higher)) for n in others]
    rivals = [(groups[n].short_name, rival, gap) for n, rival, gap in met]
    choices = len(rows[place])
    p_values = [choices * gap.p for *_, gap in rivals]
    if any(map(math.isnan, p_values)):
        return (
            None,
            f"No clear winner {told} is best, but one seed a line does not tell luck from difference.",
        )
    hardest = max(range(len(rivals)), key=lambda n: p_values[n], default=None)
    against = ""
    if hardest is not None:
        group, rival, gap = rivals[hardest]
        against = (
            f" against {display_name(rival.weights)} of {group}, {format_value(rival.last.value)}: difference "
            f"{format_interval(gap)}, p {format_p(min(1.0, p_values[hardest]))}"
        )
    if not best.last.winner:
        return None, f"No clear winner {told} is best, but not clearly so among the weights of its own runs."
    if hardest is not None and p_values[hardest] > ALPHA:
        return None, f"No clear winner {told} is best, but not clearly{against}."
    return best, f"Winner {told}{against}."


def _compare_with_best_of(
    group: Group, best: Row, other: Group, rows: Sequence[Row], higher: bool
) -> tuple[Row, Estimate]:
    """The best line of another group, and the difference of the best of all to it, over seeds."""
    rival = (max if higher else min)(rows, key=lambda row: row.last.value)
    ours, theirs = _value_per_seed(group, best), _value_per_seed(other, rival)
    shared = [seed for seed in ours if seed in theirs]
    if len(shared) == len(ours) == len(theirs):
        return rival, paired_estimate(np.array([ours[seed] - theirs[seed] for seed in shared]))
    return rival, welch_estimate(np.array(list(ours.values())), np.array(list(theirs.values())))


def _value_per_seed(group: Group, row: Row) -> dict[str, float]:
    found = group.evaluations(row.metric)
    column = int(np.searchsorted(found.steps, row.last_step))
    values = found.values[row.weights][:, column]
    return {
        seed: float(number) for seed, number in zip(group.seeds, values, strict=True) if not np.isnan(number)
    }


def combined_table(comparison: Comparison, max_lines: int | None = None) -> Table:
    """The comparison for people.

    Args:
        comparison: What to show.
        max_lines: If there are more, the best groups that fit are shown, and a note says so; None shows all.
    """
    shown = list(range(len(comparison.groups)))
    notes = []
    if max_lines is not None and sum(map(len, comparison.rows)) > max_lines:
        total = 0
        best = [
            place
            for place in comparison.ranked()
            if (total := total + len(comparison.rows[place])) <= max_lines
        ]
        shown = sorted(best or comparison.ranked()[:1])
        notes.append(
            f"The best {len(shown)} of {len(comparison.groups)} groups; table.csv and the page have all."
        )
    rows = [row for place in shown for row in comparison.rows[place]]
    keys = list(comparison.groups[0].short_settings)
    # A column that is the same on every line says it once, above.
    counts = {
        name: of
        for name, of in {"seeds": attrgetter("seeds"), "last step": attrgetter("last_step")}.items()
        if len(set(map(of, rows))) > 1
    }
    several = any(row.seeds > 1 for row in rows)
    lines = [
        _line(row, comparison.groups[place], [of(row) for of in counts.values()], several, comparison.winner)
        for place in shown
        for row in comparison.rows[place]
    ]
    title = comparison.groups[0].with_unit(comparison.metric)
    title = f"last {title}" if "last step" in counts else f"{title} at step {rows[0].last_step}"
    headers = [*keys, "weights", *counts, *row_headers(title, rows)]
    each = (
        ""
        if "seeds" in counts
        else f", {rows[0].seeds} seed{'s'[: rows[0].seeds != 1]}{' each' * bool(keys)}"
    )
    notes += row_notes(rows, comparison.higher_is_better, disagree=comparison.disagree)
    notes += ["Runs that differ in their seed or their averages alone are one group."] * bool(keys)
    notes += comparison.notes
    hidden = file_only_columns(rows, len(headers))
    name = f"{comparison.runs} runs{each}: {comparison.metric}"
    return Table(name, headers, lines, comparison.headline, notes, hidden, len(keys), comparison.metric)


def _line(row: Row, group: Group, counts: Sequence[int], several: bool, winner: Row | None) -> Line:
    cells, keys = row_cells(row, several=several)
    if row.last.winner and group.short_settings:
        cells[3] = "wins here"
    told = list(group.short_settings.values())
    return Line(
        [*told, display_name(row.weights), *map(str, counts), *cells],
        [*map(_sorted_by, told), row.weights, *counts, *keys],
        marked=row is winner,
    )


def _sorted_by(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def settings_table(comparison: Comparison) -> Table | None:
    """All in which the groups differ, a column a setting; None where their names say it."""
    runs = [group.runs[0] for group in comparison.groups]
    keys = [key for key in differing_settings(runs) if not key.startswith("ema.")]
    if not keys or not any(group.name_is_partial for group in comparison.groups):
        return None
    lines = [
        Line([group.name, *cells], [group.name, *cells])
        for group, run in zip(comparison.groups, runs, strict=True)
        for cells in [[run.settings.get(key, "(none)") for key in keys]]
    ]
    return Table("What differs between the runs", ["runs", *keys], lines)
