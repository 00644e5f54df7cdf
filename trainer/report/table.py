"""Live weights against every average: the rows, and the same table for a terminal, as Markdown and as CSV."""

import csv
import io
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TextIO

from trainer.report.read import LIVE, Run, Series

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    RowClass = type[Any]

NONE = "-"


@dataclass(frozen=True)
class Row:
    """One metric of the live weights or of one average, over a run's evaluations.

    Gaps are live minus average on the same samples; `_se` is their standard error. None stands for what does not
    exist: the gap of the live weights, the best value of a metric whose direction nobody said.
    """

    run: str
    metric: str
    weights: str
    last_step: int
    last: float
    gap: float | None
    gap_se: float | None
    verdict: str
    winner: bool
    """Best of all weights at the last evaluation step."""
    best_step: int | None
    best: float | None
    best_gap: float | None
    best_gap_se: float | None
    best_of_all: bool
    """Best of all weights at their own best steps."""


@dataclass(frozen=True)
class Line:
    """A line of a table: each cell's text, and what its column is sorted by (None or NaN: last)."""

    cells: list[str]
    keys: list[float | str | None]
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """A table for people, whatever it is rendered to."""

    title: str
    headers: list[str]
    lines: list[Line]
    headline: str = ""
    notes: list[str] = field(default_factory=list)


def label(weights: str) -> str:
    """`live` or `EMA <name>`."""
    return weights if weights == LIVE else f"EMA {weights}"


def verdict(gap: float | None, gap_se: float | None, higher_is_better: bool | None) -> str:
    """The average against the live weights: `better`, `worse` or `different` only beyond two standard errors."""
    if gap is None:
        return ""
    if not math.isfinite(gap):
        return "not finite"
    if gap_se is None or not math.isfinite(gap_se):
        return "no standard error"
    if abs(gap) <= 2 * gap_se:
        return "within 2 SE"
    if higher_is_better is None:
        return "different (> 2 SE)"
    return "better (> 2 SE)" if (gap > 0) != higher_is_better else "worse (> 2 SE)"


def best_of(values: Iterable[float], higher_is_better: bool) -> float | None:
    """The best finite value, None if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return (max if higher_is_better else min)(finite, default=None)


def rows_of(run: Run, metric: str) -> list[Row]:
    """A row for the live weights and for each average that was evaluated; none without an evaluation."""
    higher = run.higher_is_better(metric)
    curves = {name: run.evaluation(name, metric) for name in [LIVE, *run.averages]}
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return []
    last_step = max(curve[-1][0] for curve in curves.values())
    top_last = top_best = None
    if higher is not None:
        top_last = best_of((curve[-1][1] for curve in curves.values() if curve[-1][0] == last_step), higher)
        top_best = best_of((value for curve in curves.values() for _, value in curve), higher)
    return [_row(run, metric, name, curve, (last_step, top_last, top_best)) for name, curve in curves.items()]


def _row(run: Run, metric: str, name: str, curve: Series, top: tuple[int, float | None, float | None]) -> Row:
    higher = run.higher_is_better(metric)
    gaps, errors = (dict(series) for series in run.gap(name, metric))
    last_step, last = curve[-1]
    best = None if higher is None else best_of((value for _, value in curve), higher)
    best_step = next((step for step, value in curve if value == best), None)
    top_step, top_last, top_best = top
    return Row(
        run=run.name,
        metric=metric,
        weights=name,
        last_step=last_step,
        last=last,
        gap=gaps.get(last_step),
        gap_se=errors.get(last_step),
        verdict=verdict(gaps.get(last_step), errors.get(last_step), higher),
        winner=last_step == top_step and last == top_last,
        best_step=best_step,
        best=best,
        best_gap=None if best_step is None else gaps.get(best_step),
        best_gap_se=None if best_step is None else errors.get(best_step),
        best_of_all=best is not None and best == top_best,
    )


def headline(rows: Sequence[Row]) -> str:
    """Who won, in one sentence: at the last evaluation, by the metric of `rows`."""
    winner = next((row for row in rows if row.winner), None)
    if winner is None:
        return "No evaluation to compare yet." if not rows else f"No winner by {rows[0].metric}."
    if winner.weights == LIVE:
        count = len(rows) - 1
        rest = f" ({count} average{'s'[: count != 1]})" if count else " (no average was evaluated)"
        return (
            f"The live weights win by {winner.metric} at step {winner.last_step}: {value(winner.last)}{rest}."
        )
    live = next((row for row in rows if row.weights == LIVE), None)
    against = f" against {value(live.last)} live" if live else ""
    told = f", gap {gap_text(winner.gap, winner.gap_se)}" if winner.gap is not None else ""
    return (
        f"{label(winner.weights)} wins by {winner.metric} at step {winner.last_step}: {value(winner.last)}{against}"
        f"{told}; against live: {winner.verdict or 'no gap logged'}."
    )


def table_of(run: Run, metric: str) -> Table:
    """The table of one metric of a run, averages below the live weights."""
    rows = rows_of(run, metric)
    last_step = max((row.last_step for row in rows), default=0)
    headers = [
        "weights",
        f"{run.named(metric)} at step {last_step}",
        "gap ± SE",
        "against live",
        "best",
        "at step",
        "gap ± SE there",
    ]
    lines = [
        Line(
            cells=[
                label(row.weights),
                # An average that missed the last evaluation shows where its value is from.
                value(row.last) + ("" if row.last_step == last_step else f" (step {row.last_step})"),
                gap_text(row.gap, row.gap_se),
                row.verdict or NONE,
                value(row.best) + (" (best)" if row.best_of_all else ""),
                NONE if row.best_step is None else str(row.best_step),
                gap_text(row.best_gap, row.best_gap_se),
            ],
            keys=[row.weights, row.last, row.gap, row.verdict, row.best, row.best_step, row.best_gap],
            marked=row.winner,
        )
        for row in rows
    ]
    notes = [
        "gap: live minus EMA on the same samples, ± its standard error. (best): of all weights and steps."
    ]
    if metric == run.primary_metric:
        notes += slope_notes(run)
    won = headline(rows) if run.higher_is_better(metric) is not None or not rows else ""
    return Table(f"{run.name}: {metric}", headers, lines, won, notes if rows else [])


def slope_notes(run: Run) -> list[str]:
    """What the last finite `ema/slope` says of the weights beneath the averages, in words; nothing if there is none."""
    logged = [(step, slope) for step, slope in run.series("ema/slope") if math.isfinite(slope)]
    if not logged:
        return []
    step, slope = logged[-1]
    if slope >= 1.5:
        meaning = "the weights drift; a longer average lags"
    elif slope >= 0.5:
        meaning = "the weights diffuse; a longer average lags, and takes out more noise"
    else:
        meaning = "the weights are stationary; a longer average is safe"
    return [f"slope {slope:.1f} (of log ‖EMA - live‖² over log horizon, step {step}): {meaning}."]


def value(number: float | None) -> str:
    """Five significant digits or so, `-` for None."""
    if number is None:
        return NONE
    if number != 0 and math.isfinite(number) and not 1e-3 <= abs(number) < 1e5:
        return f"{number:.3e}"
    return f"{number:.4f}" if abs(number) < 100 else f"{number:.1f}"


def gap_text(gap: float | None, gap_se: float | None) -> str:
    """`+0.0521 ± 0.0031`, as many decimals as the standard error has with two digits."""
    if gap is None:
        return NONE
    if gap_se is None or not math.isfinite(gap_se):
        return f"{gap:+.4f}"
    decimals = min(8, max(0, 1 - math.floor(math.log10(gap_se)))) if gap_se > 0 else 4
    return f"{gap:+.{decimals}f} ± {gap_se:.{decimals}f}"


def to_markdown(table: Table) -> str:
    """A GitHub-flavoured table under its title, the winner in bold."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "|".join(["---"] + ["---:"] * (len(table.headers) - 1)) + "|"
    body = [line([f"**{cell}**" for cell in row.cells] if row.marked else row.cells) for row in table.lines]
    notes = [f"\n{note}" for note in [table.headline, *table.notes] if note]
    return "\n".join([f"### {table.title}\n", line(table.headers), rule, *body, *notes]) + "\n"


def to_csv(rows: Sequence[Any], kind: "RowClass") -> str:
    """All fields of the dataclass `kind` in full precision; None is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [column.name for column in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def to_rich(table: Table) -> "RichTable":
    """For a terminal: the winner in bold green with an arrow, which also tells it without colours."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    # Text, not str: rich would read square brackets in a name as markup.
    drawn = RichTable(
        box=box.SIMPLE_HEAD, title=Text(table.title, style="bold"), title_justify="left", pad_edge=False
    )
    for number, header in enumerate(table.headers):
        words = all(isinstance(row.keys[number], str) for row in table.lines)
        drawn.add_column(Text(header), justify="left" if words else "right")
    for row in table.lines:
        first = ("> " if row.marked else "  ") + row.cells[0]
        cells = [Text(cell) for cell in [first, *row.cells[1:]]]
        drawn.add_row(*cells, style="bold green" if row.marked else "")
    return drawn


def print_tables(tables: Sequence[Table], stream: TextIO | None = None) -> None:
    """Print tables with their notes; outside a terminal they are as wide as they need."""
    from rich.console import Console
    from rich.text import Text

    stream = stream or sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        # An ASCII terminal shows ± as ?, and does not end the program.
        stream.reconfigure(errors="replace")
    console = Console(file=stream, width=None if stream.isatty() else 200)
    for table in tables:
        console.print(to_rich(table))
        for note in filter(None, [table.headline, *table.notes]):
            console.print(Text(note), soft_wrap=True)
        console.print()
