"""Tables that can be shown on a terminal, in Markdown and on a page; the table of a run's weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from trainer.report.group import Group
from trainer.report.runs import Run
from trainer.report.statistics import Estimate
from trainer.report.verdicts import Row, Score, rows_of
from trainer.rundir.keys import LIVE, SLOPE

EMPTY_CELL = "-"
NO_DIRECTION = "no direction was declared, or the estimate is biased"
"""Why a metric has no winner."""
MAX_DECIMALS = 6
"""Most decimals of a gap; a gap that needs more is written with an exponent."""


@dataclass(frozen=True)
class Line:
    """A line of a table."""

    cells: list[str]
    """Text of each column."""
    keys: list[float | str | None]
    """Sorting key of each column; None and NaN are sorted last."""
    marked: bool = False
    """Whether the line is highlighted as the winner."""


@dataclass(frozen=True)
class Table:
    """A table, independent of how it is shown."""

    title: str
    headers: list[str]
    lines: list[Line]
    headline: str = ""
    notes: list[str] = field(default_factory=list)
    file_only_columns: frozenset[int] = frozenset()
    """Columns that are not shown on a terminal, to save width."""
    group_columns: int = 0
    """Number of leading columns that name a group; a terminal shows their texts only on the group's first line."""
    metric: str = ""
    """Name of the metric, if the table shows only one."""


def display_name(weights: str) -> str:
    """Return `live` or `EMA <name>`."""
    return weights if weights == LIVE else f"EMA {weights}"


def direction_text(higher_is_better: bool | None) -> str:
    """Return the direction of a metric in words; empty without a direction."""
    return "" if higher_is_better is None else f"{'higher' if higher_is_better else 'lower'} is better"


def gap_meaning(higher_is_better: bool | None) -> str:
    """Explain the sign of a gap."""
    if higher_is_better is None:
        return "live - EMA shows which is higher, not which is better"
    return f"live - EMA, {'below' if higher_is_better else 'above'} 0: EMA is better"


def headline(rows: Sequence[Row], higher_is_better: bool | None, *, disagree: bool = False) -> str:
    """Name the winner, if there is one, at the last evaluation and at the best evaluation of each seed.

    Args:
        rows: Rows of one group.
        higher_is_better: Direction of the metric; None if no run declares it or the runs disagree.
        disagree: Whether the runs declare different directions.
    """
    if not rows:
        return "No evaluation to compare yet."
    if higher_is_better is None:
        return no_direction_headline(rows[0].metric, disagree=disagree)
    last_step = max(row.last_step for row in rows)
    eligible = [row for row in rows if row.is_eligible]
    if not eligible:
        return f"No winner by {rows[0].metric} at step {last_step}: no value is finite."
    when = f"by {rows[0].metric} ({direction_text(higher_is_better)}) at step {last_step}"
    sentences = [winner_sentence({row.weights: row.last for row in eligible}, when, higher_is_better)]
    winner = next((row for row in eligible if row.last.winner), None)
    rivals = [display_name(row.weights) for row in eligible if row.may_be_best and row is not winner]
    if winner is not None and winner.weights != LIVE and rivals:
        sentences.append(f"Not clearly worse than it: {', '.join(rivals)}.")
    best = {row.weights: row.best for row in eligible if row.best is not None}
    if max(row.seeds for row in rows) > 1 and best and not best_is_last(rows):
        sentences.append(winner_sentence(best, "at each seed's own best step", higher_is_better))
    return " ".join(sentences)


def no_direction_headline(metric: str, *, disagree: bool = False) -> str:
    """Explain why a metric without a direction, or with several, has no winner."""
    why = "the runs disagree on whether higher or lower is better" if disagree else NO_DIRECTION
    return f"No winner by {metric}: {why}."


def winner_sentence(scores: dict[str, Score], when: str, higher_is_better: bool) -> str:
    """Name the winner among weights with finite values, or the best ones and their gap if none is clearly best.

    Args:
        scores: Scores by the name of the weights.
        when: Metric and step of the scores, as a part of the sentence.
        higher_is_better: Direction of the metric.
    """
    top = (max if higher_is_better else min)(scores, key=lambda name: scores[name].value)
    best, live = scores[top], scores.get(LIVE)
    count = sum(name != LIVE for name in scores)
    if top == LIVE:
        if best.winner:
            return f"The live weights win {when}: {format_value(best.value)}, and every average is worse ({count})."
        if not count:
            return f"Nothing to compare with {when}: {format_value(best.value)} live, and no average."
        live_value = format_value(best.value)
        return (
            f"No clear winner {when}: live is best with {live_value}, but not clearly better than every EMA."
        )
    against = f" against {format_value(live.value)} live" if live else ""
    family = f", adjusted for {count} averages" if count > 1 else ""
    gap = f"live - EMA {format_interval(best.gap)}, p {format_p(best.p)}{family}"
    if best.winner:
        return f"{display_name(top)} wins {when}: {format_value(best.value)}{against}; {gap}."
    return f"No clear winner {when}: {display_name(top)} is best with {format_value(best.value)}{against}; {gap}."


def table_of(source: Run | Group, metric: str) -> Table:
    """Make the table of one metric of a run or group: a line for the live weights and one for each average."""
    rows, higher = rows_of(source, metric), source.higher_is_better(metric)
    last_step = max((row.last_step for row in rows), default=0)
    headers = ["weights", *row_headers(f"{source.with_unit(metric)} at step {last_step}", rows)]
    lines = []
    for row in rows:
        cells, keys = row_cells(row, last_step)
        lines.append(Line([display_name(row.weights), *cells], [row.weights, *keys], row.last.winner))
    disagree = isinstance(source, Group) and len(source.directions(metric)) > 1
    notes = row_notes(rows, higher, disagree=disagree)
    if isinstance(source, Run) and metric == source.primary_metric:
        notes += slope_notes(source)
    return Table(
        title=f"{source.name}: {metric}",
        headers=headers,
        lines=lines,
        headline=headline(rows, higher, disagree=disagree),
        notes=notes if rows else [],
        file_only_columns=file_only_columns(rows, len(headers)),
        metric=metric,
    )


def file_only_columns(rows: Sequence[Row], columns: int) -> frozenset[int]:
    """Return the columns that a terminal does not show, for a table whose last columns are those of `row_cells`.

    These are the tests at the best step. If each row is best at the last evaluation, they include the best value and
    its step, and `row_notes` mentions it.
    """
    total = 8 if any(row.seeds > 1 for row in rows) else 7
    shown = 4 if best_is_last(rows) else 6
    return frozenset(range(columns - total + shown, columns))


def best_is_last(rows: Sequence[Row]) -> bool:
    """Return whether every row is best at its last evaluation."""
    return all(row.best is None or row.best.value == row.last.value for row in rows)


def row_headers(value_header: str, rows: Sequence[Row]) -> list[str]:
    """Return the headers of the columns that `row_cells` makes."""
    headers = [value_header, "live - EMA [95 % CI]", "p (Holm)", "against live", "best", "at step"]
    if any(row.seeds > 1 for row in rows):
        return [*headers, "best live - best EMA [95 % CI]", "p at best"]
    return [*headers, "live - EMA there [95 % CI]"]


def row_cells(
    row: Row, last_step: int | None = None, *, several: bool = False
) -> tuple[list[str], list[float | str | None]]:
    """Return texts and sorting keys: last value, its gap, p and verdict; best value, its step and gap.

    Args:
        row: Row to show.
        last_step: Last step of the table; a value of an earlier step is followed by its step. None never shows a step.
        several: Whether the table has rows of several seeds and therefore a column for the p-value at the best step.
    """
    last, best = row.last, row.best
    early = "" if last_step in (None, row.last_step) else f" (step {row.last_step})"
    steps = EMPTY_CELL if row.best_steps is None else "-".join(map(str, dict.fromkeys(row.best_steps)))
    cells = [
        format_mean(last) + early,
        format_interval(last.gap),
        format_p(last.p),
        last.verdict or EMPTY_CELL,
        format_mean(best) + (" (best)" if row.best_of_all else ""),
        steps,
        format_interval(best.gap if best else None),
    ]
    keys: list[float | str | None] = [
        last.value,
        last.gap.mean if last.gap else None,
        last.p,
        last.verdict,
        best.value if best else None,
        row.best_steps[0] if row.best_steps else None,
        best.gap.mean if best and best.gap else None,
    ]
    if several or row.seeds > 1:
        cells.append(format_p(best.p if best else math.nan))
        keys.append(best.p if best else None)
    return cells, keys


def row_notes(rows: Sequence[Row], higher: bool | None, *, disagree: bool = False) -> list[str]:
    """Explain the columns of `row_cells`; the arguments are those of `headline`."""
    direction = direction_text(higher).capitalize()
    direction = direction or ("The runs disagree on the direction" if disagree else "No verdict")
    notes = [f"{direction}. {gap_meaning(higher)}. A winner needs p up to 0.05."]
    tests = "CI unadjusted, p adjusted for all averages (Holm)."
    if any(row.seeds > 1 for row in rows):
        notes.append(f"±: SD over seeds. CI, p: Student's t over the seeds' paired gaps. {tests}")
    else:
        notes.append(f"One run: CI, p over its evaluation samples, not over seeds. {tests}")
    if higher is not None and best_is_last(rows):
        notes.append("Every value is the best of its weights: none was better at an earlier evaluation.")
    elif any(row.best_of_all for row in rows):
        notes.append("(best): of all weights and steps.")
    return notes


def slope_notes(run: Run) -> list[str]:
    """Explain the last finite `ema/slope` in a sentence; no note if it was not logged."""
    logged = run.series(SLOPE).finite()
    if not len(logged.steps):
        return []
    step, slope = int(logged.steps[-1]), float(logged.values[-1])
    if slope >= 1.5:
        meaning = "the weights drift; a longer average lags"
    elif slope >= 0.5:
        meaning = "the weights diffuse; a longer average lags, and takes out more noise"
    else:
        meaning = "the weights are stationary; a longer average is safe"
    return [f"slope {slope:.1f} (of log ‖EMA - live‖² over log horizon, step {step}): {meaning}."]


def format_value(number: float | None) -> str:
    """Format a number with about five significant digits; `-` for None."""
    if number is None:
        return EMPTY_CELL
    if number != 0 and math.isfinite(number) and not 1e-3 <= abs(number) < 1e5:
        return f"{number:.3e}"
    return f"{number:.4f}" if abs(number) < 100 else f"{number:.1f}"


def format_mean(score: Score | None) -> str:
    """Format mean and standard deviation over seeds (`1.4431 ± 0.0029`); only the value for a single seed."""
    if score is None or score.sd is None:
        return format_value(score.value if score else None)
    return f"{format_value(score.value)} ± {score.sd:.2g}"


def format_interval(gap: Estimate | None) -> str:
    """Format a gap and its interval (`+0.0521 [0.0460, 0.0582]`) so that half the interval has two digits."""
    if gap is None:
        return EMPTY_CELL
    low, high = gap.interval
    if math.isnan(low) or low == high:  # no interval, or one narrower than the precision of a float
        return f"{gap.mean:+.4f}"
    reach = (high - low) / 2
    decimals = max(0, 1 - math.floor(math.log10(reach)))
    if decimals > MAX_DECIMALS:
        return f"{gap.mean:+.2e} [{low:.2e}, {high:.2e}]"
    return f"{gap.mean:+.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"


def format_p(p: float) -> str:
    """Format a p-value with two digits; values below 0.0001 are not distinguished."""
    if math.isnan(p):
        return EMPTY_CELL
    return "<0.0001" if p < 1e-4 else f"{p:.2g}"


def to_markdown(table: Table) -> str:
    """Format a table as GitHub-flavoured Markdown below its title, the winner in bold."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "|".join(["---"] + ["---:"] * (len(table.headers) - 1)) + "|"
    body = [line([f"**{cell}**" for cell in row.cells] if row.marked else row.cells) for row in table.lines]
    notes = [f"\n{note}" for note in [table.headline, *table.notes] if note]
    return "\n".join([f"### {table.title}\n", line(table.headers), rule, *body, *notes]) + "\n"
