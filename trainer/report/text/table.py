"""Tables that can be shown on a terminal, in Markdown and on a page; the table of a run's weights."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from trainer.config.averages import HORIZON
from trainer.report.best_decay import decay_text, optimum
from trainer.report.earlier import earlier_best
from trainer.report.format import (
    EMPTY_CELL,
    direction_text,
    display_name,
    format_difference,
    format_interval,
    format_mean,
    format_p,
)
from trainer.report.group import Group
from trainer.report.headline import best_is_last, headline
from trainer.report.made import made_notes
from trainer.report.pairs import eliminated_at
from trainer.report.races import races_note
from trainer.report.runs import Run, unfinished_note
from trainer.report.verdicts import Row, rows_of
from trainer.rundir.keys import LIVE, SLOPE
from trainer.rundir.pairs import PAIRS
from trainer.shell.printable import markdown_cell


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
    """The verdict; of several settings a line for each question."""
    notes: list[str] = field(default_factory=list)
    file_only_columns: frozenset[int] = frozenset()
    """Columns that are not shown on a terminal, to save width."""
    group_columns: int = 0
    """Number of leading columns that name a group; a terminal shows their texts only on the group's first line."""
    metric: str = ""
    """Name of the metric, if the table shows only one."""


def gap_meaning(higher_is_better: bool | None) -> str:
    """Explain the sign of a gap."""
    if higher_is_better is None:
        return "live - EMA shows which is higher, not which is better"
    return f"live - EMA, {'below' if higher_is_better else 'above'} 0: EMA is better"


def table_of(run: Run, metric: str) -> Table:
    """Make the table of one metric of a run: a line for live and for each average."""
    group, higher = Group(run.name, [run]), run.higher_is_better(metric)
    rows = rows_of(group, metric)
    last_step = max((row.last_step for row in rows), default=0)
    headers = ["weights", *row_headers(f"{run.with_unit(metric)} at step {last_step}", rows)]
    lines = []
    for row in rows:
        cells, keys = row_cells(row, last_step)
        lines.append(Line([named_with_decay(group, row), *cells], [row.weights, *keys], row.last.winner))
    notes = row_notes(rows, higher) if rows else []
    if rows and metric == run.primary_metric:
        notes += [
            *unfinished_note([run]),
            *race_notes(group, metric, last_step),
            *races_note(run, metric, last_step),
            *optimum_notes(group, rows),
            *made_notes(run),
            *slope_notes(run),
        ]
    sentences = [headline(rows, higher, split=run.split(metric))]
    if (earlier := earlier_best(run, metric)) is not None:
        sentences.append(earlier.sentence)
    return Table(
        title=f"{run.name}: {metric}",
        headers=headers,
        lines=lines,
        headline=" ".join(sentences),
        notes=notes,
        file_only_columns=file_only_columns(rows, len(headers)),
        metric=metric,
    )


def named_with_decay(group: Group, row: Row) -> str:
    """Return the name of a row's weights; an average of `ema.axis`, which is named by its horizon, with its decay."""
    name = display_name(row.weights)
    horizon = group.horizons.get(row.weights) if row.weights.startswith(HORIZON) else None
    return name if horizon is None else f"{name} ({decay_text(horizon)})"


def file_only_columns(rows: Sequence[Row], columns: int) -> frozenset[int]:
    """Return the columns that a terminal does not show, for a table whose last columns are those of `row_cells`.

    These are the tests at the best step. If each row is best at the last evaluation, they include the best value and
    its step, and `row_notes` mentions it.
    """
    total = 8 if any(row.seeds > 1 for row in rows) else 7
    shown = 4 if best_is_last(rows) else 6
    return frozenset(range(columns - total + shown, columns))


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
    tested = Counter(row.group for row in rows if not math.isnan(row.last.p))
    counts = set(tested.values())
    averages = f"{max(counts, default=1)} averages" if len(counts) < 2 else "all averages of a group"
    tests = f"CI unadjusted, p adjusted for {averages} (Holm)." if max(counts, default=1) > 1 else ""
    several = any(row.seeds > 1 for row in rows)
    over_seeds = "±: SD over seeds. CI, p: Student's t over the seeds' paired gaps."
    runs = any(row.last.gap is not None and row.last.gap.runs > 1 for row in rows)
    and_runs = " and its runs" * runs
    over_samples = f"One seed: CI, p over its evaluation samples{and_runs}, not over seeds."
    notes.append(f"{over_seeds if several else over_samples} {tests}".rstrip())
    if further := max((row.further_samples for row in rows), default=0):
        notes.append(
            f"Last values, CI and p are over {further:,} further samples; best values over those of every evaluation."
        )
    if higher is not None and best_is_last(rows):
        notes.append("No weights were better at an earlier evaluation than at the last one.")
    elif any(row.best_of_all for row in rows):
        notes.append("(best): of all weights and steps.")
        if several:
            notes.append("best: the mean over the seeds of each one's best value, at its own step.")
    return notes


def race_notes(group: Group, metric: str, step: int) -> list[str]:
    """List the averages that a race eliminated at a step, each with its difference to the best one; [] without any."""
    texts = []
    for own in eliminated_at(group, metric, step):
        gap = "" if own.gap is None else f", {format_difference(own.gap)}"
        texts.append(f"{display_name(own.weights)} ({own.samples} samples{gap})")
    end = "each difference is to the best average, on the same samples."
    return [f"Eliminated at step {step}: {', '.join(texts)}; {end}"] if texts else []


def optimum_notes(group: Group, rows: Sequence[Row]) -> list[str]:
    """State the best decay with the interval of the optimum, and why it is wide if the run has no paired values."""
    best = optimum(group, rows)
    notes = [] if best is None else [f"{str(best).capitalize()} (95 %)."]
    averages = [row for row in rows if row.weights != LIVE and row.is_eligible]
    if group.runs[0].pairs is None and len(averages) > 1:
        notes.append(f"Without {PAIRS}, averages are compared only through their gaps to live.")
    return notes


def slope_notes(run: Run) -> list[str]:
    """Explain the last finite `ema/slope` in a sentence; no note if it was not logged."""
    logged = run.series(SLOPE).finite()
    if not len(logged.steps):
        return []
    step, slope = int(logged.steps[-1]), float(logged.values[-1])
    if slope >= 1.5:
        meaning = "The weights still move: a longer average would lag"
    elif slope >= 0.5:
        meaning = "The weights wander: a longer average would lag more, and take out more noise"
    else:
        meaning = "The weights move around one place: a longer average would not lag"
    return [f"{meaning} (‖EMA - live‖² grows with the horizon to the power {slope:.1f}, step {step})."]


def to_markdown(table: Table) -> str:
    """Format a table as GitHub-flavoured Markdown below its title, the winner in bold."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(map(markdown_cell, cells)) + " |"

    rule = "|" + "|".join(["---"] + ["---:"] * (len(table.headers) - 1)) + "|"
    body = [line([f"**{cell}**" for cell in row.cells] if row.marked else row.cells) for row in table.lines]
    notes = [f"\n{markdown_cell(note)}" for note in [table.headline, *table.notes] if note]
    return "\n".join([f"### {markdown_cell(table.title)}\n", line(table.headers), rule, *body, *notes]) + "\n"
