"""Tables for people: one and the same for a terminal, as Markdown and for a page; and the table of a run's weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from trainer.report.group import Group
from trainer.report.runs import LIVE, Run
from trainer.report.statistics import Estimate
from trainer.report.verdicts import Row, Score, rows_of

EMPTY_CELL = "-"
NO_DIRECTION = "no direction was declared, or the estimate is biased"
"""Why a metric names nobody better."""
MAX_DECIMALS = 6
"""More of them and a gap is told with its exponent."""


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
    file_only_columns: frozenset[int] = frozenset()
    """Columns that a terminal leaves out: those that say little are not worth the width."""
    group_columns: int = 0
    """First columns whose texts stand for the lines below, too: a terminal shows them once."""
    metric: str = ""
    """Name of the metric, of a table of one alone."""


def display_name(weights: str) -> str:
    """`live` or `EMA <name>`."""
    return weights if weights == LIVE else f"EMA {weights}"


def direction_text(higher_is_better: bool | None) -> str:
    """Which way a metric should go, in words; nothing if nobody said."""
    return "" if higher_is_better is None else f"{'higher' if higher_is_better else 'lower'} is better"


def gap_meaning(higher_is_better: bool | None) -> str:
    """What the sign of a gap says."""
    if higher_is_better is None:
        return "live - EMA tells which is higher, not which is better"
    return f"live - EMA, {'below' if higher_is_better else 'above'} 0: EMA is better"


def headline(rows: Sequence[Row], higher_is_better: bool | None, *, disagree: bool = False) -> str:
    """Who won and whether anybody did, in a sentence or two: at the last evaluation, and at the best.

    Args:
        rows: Those of one group.
        higher_is_better: Direction of the metric; None if there is none that all runs tell.
        disagree: Whether that is so because they tell several.
    """
    if not rows:
        return "No evaluation to compare yet."
    if higher_is_better is None:
        return no_direction_headline(rows[0].metric, disagree=disagree)
    last_step = max(row.last_step for row in rows)
    seen = [row for row in rows if row.is_eligible]
    if not seen:
        return f"No winner by {rows[0].metric} at step {last_step}: no value is finite."
    place = f"by {rows[0].metric} ({direction_text(higher_is_better)}) at step {last_step}"
    told = [winner_sentence({row.weights: row.last for row in seen}, place, higher_is_better)]
    winner = next((row for row in seen if row.last.winner), None)
    rivals = [display_name(row.weights) for row in seen if row.may_be_best and row is not winner]
    if winner is not None and winner.weights != LIVE and rivals:
        told.append(f"Not told apart from it: {', '.join(rivals)}.")
    best = {row.weights: row.best for row in seen if row.best is not None}
    if max(row.seeds for row in rows) > 1 and best and not best_is_last(rows):
        told.append(winner_sentence(best, "at each seed's own best step", higher_is_better))
    return " ".join(told)


def no_direction_headline(metric: str, *, disagree: bool = False) -> str:
    """Instead of a headline where nobody said which way a metric should go, or not all runs say the same."""
    why = "the runs disagree on whether higher or lower is better" if disagree else NO_DIRECTION
    return f"No winner by {metric}: {why}."


def winner_sentence(scores: dict[str, Score], place: str, higher_is_better: bool) -> str:
    """The sentence on who won among some weights, all of them finite."""
    top = (max if higher_is_better else min)(scores, key=lambda name: scores[name].value)
    best, live = scores[top], scores.get(LIVE)
    count = sum(name != LIVE for name in scores)
    if top == LIVE:
        if best.winner:
            return f"The live weights win {place}: {format_value(best.value)}, and every average is worse ({count})."
        if not count:
            return f"Nothing to compare with {place}: {format_value(best.value)} live, and no average."
        live_value = format_value(best.value)
        return (
            f"No clear winner {place}: live is best with {live_value}, but not clearly better than every EMA."
        )
    against = f" against {format_value(live.value)} live" if live else ""
    family = f", adjusted for {count} averages" if count > 1 else ""
    told = f"live - EMA {format_interval(best.gap)}, p {format_p(best.p)}{family}"
    if best.winner:
        return f"{display_name(top)} wins {place}: {format_value(best.value)}{against}; {told}."
    return f"No clear winner {place}: {display_name(top)} is best with {format_value(best.value)}{against}; {told}."


def table_of(source: Run | Group, metric: str) -> Table:
    """The table of one metric of a run or of the seeds of one configuration, averages below the live weights."""
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
    hidden = file_only_columns(rows, len(headers))
    told = headline(rows, higher, disagree=disagree)
    title = f"{source.name}: {metric}"
    return Table(title, headers, lines, told, notes if rows else [], hidden, metric=metric)


def file_only_columns(rows: Sequence[Row], columns: int) -> frozenset[int]:
    """Of a table whose last columns `row_cells` made: what is told of the best step beside value and step.

    Value and step as well, where each row is best at the last evaluation; a note says so.
    """
    made = 8 if any(row.seeds > 1 for row in rows) else 7
    shown = 4 if best_is_last(rows) else 6
    return frozenset(range(columns - made + shown, columns))


def best_is_last(rows: Sequence[Row]) -> bool:
    """Whether every row is best at its last evaluation."""
    return all(row.best is None or row.best.value == row.last.value for row in rows)


def row_headers(value_header: str, rows: Sequence[Row]) -> list[str]:
    """Heads of what `row_cells` makes."""
    several = any(row.seeds > 1 for row in rows)
    there = "best live - best EMA [95 % CI]" if several else "live - EMA there [95 % CI]"
    tested = ["p at best"] if several else []
    return [
        value_header,
        "live - EMA [95 % CI]",
        "p (Holm)",
        "against live",
        "best",
        "at step",
        there,
        *tested,
    ]


def row_cells(
    row: Row, last_step: int | None = None, *, several: bool = False
) -> tuple[list[str], list[float | str | None]]:
    """Texts and sorting keys of a row: last value, gap, p, verdict, best, its step, gap there.

    Args:
        row: The row.
        last_step: Of the table; another one is shown beside the value. None shows none.
        several: Whether the table has rows of several seeds, and so a p-value at the best step.
    """
    last, best = row.last, row.best
    # Whose last value is from an earlier step shows that.
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
    """How to read `row_cells`; the arguments are those of `headline`."""
    way = direction_text(higher).capitalize()
    way = way or ("The runs disagree on the direction" if disagree else "No verdict")
    notes = [f"{way}. {gap_meaning(higher)}. A winner needs p up to 0.05."]
    tested = "CI of each alone, p adjusted for all (Holm)."
    if any(row.seeds > 1 for row in rows):
        notes.append(f"±: SD over seeds. CI, p: Student's t over the seeds' paired gaps; {tested}")
    else:
        notes.append(f"One run: CI, p over its evaluation samples say nothing of another seed; {tested}")
    if higher is not None and best_is_last(rows):
        notes.append("Every value is the best of its weights: none was better at an earlier evaluation.")
    elif any(row.best_of_all for row in rows):
        notes.append("(best): of all weights and steps.")
    return notes


def slope_notes(run: Run) -> list[str]:
    """What the last finite `ema/slope` says of the weights beneath the averages, in words; nothing if there is none."""
    logged = run.series("ema/slope").finite()
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
    """Five significant digits or so, `-` for None."""
    if number is None:
        return EMPTY_CELL
    if number != 0 and math.isfinite(number) and not 1e-3 <= abs(number) < 1e5:
        return f"{number:.3e}"
    return f"{number:.4f}" if abs(number) < 100 else f"{number:.1f}"


def format_mean(score: Score | None) -> str:
    """`1.4431 ± 0.0029`: the mean over seeds and their standard deviation; the value alone of a single one."""
    if score is None or score.sd is None:
        return format_value(score.value if score else None)
    return f"{format_value(score.value)} ± {score.sd:.2g}"


def format_interval(gap: Estimate | None) -> str:
    """`+0.0521 [0.0460, 0.0582]`, as many decimals as give the interval's half two digits."""
    if gap is None:
        return EMPTY_CELL
    low, high = gap.interval
    if math.isnan(low) or low == high:  # narrower than a float can tell
        return f"{gap.mean:+.4f}"
    reach = (high - low) / 2
    decimals = max(0, 1 - math.floor(math.log10(reach)))
    if decimals > MAX_DECIMALS:
        return f"{gap.mean:+.2e} [{low:.2e}, {high:.2e}]"
    return f"{gap.mean:+.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"


def format_p(p: float) -> str:
    """Two digits, nothing below 0.0001."""
    if math.isnan(p):
        return EMPTY_CELL
    return "<0.0001" if p < 1e-4 else f"{p:.2g}"


def to_markdown(table: Table) -> str:
    """A GitHub-flavoured table under its title, the winner in bold."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "|".join(["---"] + ["---:"] * (len(table.headers) - 1)) + "|"
    body = [line([f"**{cell}**" for cell in row.cells] if row.marked else row.cells) for row in table.lines]
    notes = [f"\n{note}" for note in [table.headline, *table.notes] if note]
    return "\n".join([f"### {table.title}\n", line(table.headers), rule, *body, *notes]) + "\n"
