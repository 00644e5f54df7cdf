"""All metrics but the primary one, a line each: for terminals, where a table a metric would be read by nobody."""

from collections.abc import Sequence

from trainer.report.comparison import Comparison, combine
from trainer.report.runs import LIVE, Run
from trainer.report.text.table import (
    NO_DIRECTION,
    Line,
    Table,
    display_name,
    format_interval,
    format_p,
    format_value,
    table_of,
)
from trainer.report.verdicts import MISSED, Row

DIRECTIONS = {True: "higher", False: "lower", None: "no verdict"}


def brief(run: Run) -> list[Table]:
    """A run in short: all weights by the primary metric, and a line for each other metric."""
    comparisons = [made for metric in run.metrics if (made := combine([run], metric)) is not None]
    others = other_metrics(comparisons)
    return [table_of(run, run.primary_metric), *([others] if others else [])]


def other_metrics(comparisons: Sequence[Comparison]) -> Table | None:
    """Of each comparison the live weights and the best average, those of the best group; None without comparisons.

    Where nobody declared a direction there is no best one: then it is the average that is best by the primary metric.

    Args:
        comparisons: By each metric of the same runs, the primary one first, which has a table of its own.
    """
    if len(comparisons) < 2:
        return None
    first, others = comparisons[0], comparisons[1:]
    lines = [_line(found, first) for found in others]
    headers = [
        "metric",
        "is better",
        *first.groups[0].short_settings,
        "average",
        "value",
        "live",
        "live - EMA [95 % CI]",
    ]
    notes = []
    if len(first.groups) > 1:
        notes.append(
            "Each by its own best average of all groups; > marks one that is clearly the best of all."
        )
    if any(found.disagree for found in others):
        notes.append(
            f"Runs disagree: on higher_is_better. Told of the average that is best by {first.metric}."
        )
    if any(found.higher_is_better is None and not found.disagree for found in others):
        notes.append(f"No verdict: {NO_DIRECTION}. Told of the average that is best by {first.metric}.")
    title = "other metrics" if len(first.groups) == 1 else f"{first.runs} runs: other metrics"
    return Table(title, [*headers, "p (Holm)", "against live"], lines, notes=notes)


def _line(comparison: Comparison, primary: Comparison) -> Line:
    place, row = _representative_row(comparison, primary)
    live = next((own for own in comparison.rows[place] if own.weights == LIVE), None)
    # Groups of the runs that have this metric may be called by less than those of all.
    runs = comparison.groups[place].sources(LIVE)
    home = next((group for group in primary.groups if group.sources(LIVE) & runs), comparison.groups[place])
    settings = [home.short_settings.get(key, "") for key in primary.groups[0].short_settings]
    name = comparison.groups[place].with_unit(comparison.metric)
    way = "runs disagree" if comparison.disagree else DIRECTIONS[comparison.higher_is_better]
    numbers = [row.last.value, live.last.value if live else None]
    gap = row.last.gap
    cells = [
        name,
        way,
        *settings,
        display_name(row.weights),
        *map(format_value, numbers),
        format_interval(gap),
    ]
    keys = [name, way, *settings, row.weights, *numbers, gap.mean if gap else None]
    marked = comparison.winner is row
    return Line(
        [*cells, format_p(row.last.p), row.last.verdict or "-"], [*keys, row.last.p, row.last.verdict], marked
    )


def _representative_row(comparison: Comparison, primary: Comparison) -> tuple[int, Row]:
    """The line that stands for all, and the place of its group: the best average of all, else the live weights."""
    judge = comparison if comparison.higher_is_better is not None else primary
    sign = -1.0 if judge.higher_is_better else 1.0
    ranked = sorted(
        (sign * row.last.value, group.name, row.weights, sorted(group.sources(row.weights)))
        for group, rows in zip(judge.groups, judge.rows, strict=True)
        for row in rows
        if row.weights != LIVE and row.is_eligible
    )
    # Not by their names: these are made of what differs between the runs that have the metric.
    lines = {
        member: (place, row)
        for place, (group, rows) in enumerate(zip(comparison.groups, comparison.rows, strict=True))
        for row in rows
        if row.last.verdict != MISSED
        for member in group.sources(row.weights)
    }
    found = (lines[member] for *_, members in ranked for member in members if member in lines)
    return next(found, (0, comparison.rows[0][0]))
