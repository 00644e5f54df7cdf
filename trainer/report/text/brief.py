"""Short tables for a terminal: the primary metric in full, and one line for each other metric."""

from collections.abc import Sequence

from trainer.report.comparison import Comparison, combine
from trainer.report.format import display_name, format_value
from trainer.report.headline import NO_DIRECTION
from trainer.report.runs import Run
from trainer.report.text.table import Line, Table, row_cells, table_of
from trainer.report.verdicts import ELIMINATED, MISSED, Row
from trainer.rundir.keys import LIVE

DIRECTIONS = {True: "higher", False: "lower", None: "no verdict"}


def brief(run: Run) -> list[Table]:
    """Return the table of a run's primary metric, and the table of its other metrics if there are any."""
    comparisons = [made for metric in run.metrics if (made := combine([run], metric)) is not None]
    return [table_of(run, run.primary_metric), *other_metrics(comparisons)]


def other_metrics(comparisons: Sequence[Comparison]) -> list[Table]:
    """Make a table with a line for each metric except the first: its best average and the live weights.

    The live weights are those of the same group. A metric without a direction has no best average. Its line shows the
    average that is best by the primary metric.

    Args:
        comparisons: Comparisons of the same runs by each metric, the primary metric first.

    Returns:
        This table; [] with fewer than two comparisons.
    """
    if len(comparisons) < 2:
        return []
    first, others = comparisons[0], comparisons[1:]
    settings = first.groups[0].short_settings
    headers = ["metric", "is better", *settings, "average", "value", "live", "live - EMA [95 % CI]"]
    notes = []
    if len(first.groups) > 1:
        notes.append("Each line: the best average of all groups by that metric; > if it is clearly the best.")
    shown = f"The average shown is the best by {first.metric}."
    if any(comparison.disagree for comparison in others):
        notes.append(f"Runs disagree: on higher_is_better. {shown}")
    if any(comparison.higher_is_better is None and not comparison.disagree for comparison in others):
        notes.append(f"No verdict: {NO_DIRECTION}. {shown}")
    title = "other metrics" if len(first.groups) == 1 else f"{first.runs} runs: other metrics"
    lines = [_line(comparison, first) for comparison in others]
    return [Table(title, [*headers, "p (Holm)", "against live"], lines, notes=notes)]


def _line(comparison: Comparison, primary: Comparison) -> Line:
    index, row = _representative_row(comparison, primary)
    live = next((own for own in comparison.rows[index] if own.weights == LIVE), None)
    # The groups of this comparison may have fewer runs, and therefore other settings, than those of the primary metric.
    group = comparison.groups[index]
    runs = group.sources(LIVE)
    primary_group = next((own for own in primary.groups if own.sources(LIVE) & runs), group)
    settings = [primary_group.short_settings.get(key, "") for key in primary.groups[0].short_settings]
    name = group.with_unit(comparison.metric)
    direction = "runs disagree" if comparison.disagree else DIRECTIONS[comparison.higher_is_better]
    numbers = [row.last.value, live.last.value if live else None]
    cells, keys = row_cells(row)
    return Line(
        [name, direction, *settings, display_name(row.weights), *map(format_value, numbers), *cells[1:4]],
        [name, direction, *settings, row.weights, *numbers, *keys[1:4]],
        marked=comparison.winner is row,
    )


def _representative_row(comparison: Comparison, primary: Comparison) -> tuple[int, Row]:
    """Return the group index and the row of the best average of all groups, else of the live weights."""
    ranking = comparison if comparison.higher_is_better is not None else primary
    sign = -1.0 if ranking.higher_is_better else 1.0
    ranked = sorted(
        (sign * row.last.value, group.name, row.weights, sorted(group.sources(row.weights)))
        for group, rows in zip(ranking.groups, ranking.rows, strict=True)
        for row in rows
        if row.weights != LIVE and row.is_eligible
    )
    # Rows are matched by run directory, because the names of groups may differ between two comparisons.
    by_source = {
        source: (index, row)
        for index, (group, rows) in enumerate(zip(comparison.groups, comparison.rows, strict=True))
        for row in rows
        if row.last.verdict not in (MISSED, ELIMINATED)
        for source in group.sources(row.weights)
    }
    matches = (by_source[source] for *_, sources in ranked for source in sources if source in by_source)
    return next(matches, (0, comparison.rows[0][0]))
