"""The pictures of a report: evaluation curves with gaps, loss over decay, divergence.

Every line differs in colour (Okabe and Ito's palette, distinct for the colour-blind), in marker and in dashes, so that
a print in black and white tells them apart. Legends lie outside the axes. Nothing here needs a display.
"""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from trainer.files import write_atomically
from trainer.report.combine import GroupRow
from trainer.report.read import LIVE, Run, Series
from trainer.report.table import label
from trainer.report.table import value as value_text

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#5D5D5D"]
MARKERS = ["s", "^", "D", "v", "P", "X", "<", ">", "p", "h"]
DASHES = ["-", "--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)), (0, (8, 3))]
RC: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
DPI = 150
STEPS = "optimizer step"
MAX_ROWS = 40

Limits = tuple[float, float]


def line_style(name: str, averages: Sequence[str]) -> dict[str, Any]:
    """The same look of an average in every picture of a run; the live weights are thick, black and round."""
    if name == LIVE:
        return {
            "color": "black",
            "marker": "o",
            "linestyle": "-",
            "linewidth": 2.2,
            "markersize": 5,
            "zorder": 3,
        }
    place = averages.index(name)
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": DASHES[place % len(DASHES)],
        "linewidth": 1.6,
        "markersize": 5,
    }


def draw_curves(run: Run, metric: str, path: Path) -> bool:
    """Evaluation `metric` of live and every average over steps, and below it each gap ± 2 standard errors.

    A first evaluation of an untrained model, or an average that hardly moved, would flatten all the rest: then the
    axes show what is at least as good as the live weights were a quarter through, and the legend names what is off.

    Returns:
        False if there is nothing to draw (no evaluation).
    """
    curves = {name: run.evaluation(name, metric) for name in [LIVE, *run.averages]}
    curves = {name: curve for name, curve in curves.items() if _finite(curve)}
    if LIVE not in curves:
        return False
    gaps = {name: run.gap(name, metric) for name in curves if name != LIVE}
    gaps = {name: pair for name, pair in gaps.items() if _finite(pair[0])}
    limits = focus(curves, run.higher_is_better(metric))

    def draw(figure: Figure) -> None:
        ratios = [3, 2] if gaps else [3]
        panels = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        for name, curve in curves.items():
            away = limits is not None and not limits[0] <= curve[-1][1] <= limits[1]
            text = label(name) + (f" (off axis: {value_text(curve[-1][1])})" if away else "")
            panels[0].plot(*_columns(curve), label=text, **line_style(name, run.averages))
        panels[0].set_ylabel(f"evaluation {run.named(metric)}")
        if limits is not None:
            panels[0].set_ylim(*limits)
        if gaps:
            low, high = _draw_gaps(panels[1], run, gaps, _visible(curves, limits))
            panels[1].set_ylim(*_gap_limits(low, high, run.higher_is_better(metric)))
            panels[1].set_ylabel("gap: live - EMA\n± 2 standard errors")
        _finish(figure, list(panels), columns=3)

    _save(path, draw, height=6.4 if gaps else 4.4)
    return True


def _draw_gaps(
    axes: Axes, run: Run, gaps: dict[str, tuple[Series, Series]], visible: set[tuple[str, int]]
) -> Limits:
    """Draw the gaps; the range of those whose curves are on the axes above, 0 included."""
    reaches: list[float] = [0.0]
    for name, (gap, errors) in gaps.items():
        by_step = dict(errors)
        spread = [2 * by_step.get(step, math.nan) for step, _ in gap]
        axes.errorbar(
            *_columns(gap), yerr=spread, capsize=2, elinewidth=1.0, **line_style(name, run.averages)
        )
        for (step, middle), reach in zip(gap, spread, strict=True):
            if (name, step) in visible and math.isfinite(middle):
                around = 0.0 if math.isnan(reach) else reach
                reaches += [middle - around, middle + around]
    axes.axhline(0, color="black", linewidth=1)
    return min(reaches), max(reaches)


def _gap_limits(low: float, high: float, higher_is_better: bool | None) -> Limits:
    """All gaps, but an average's lag early on may fill at most three quarters: the question is who wins by how much."""
    if higher_is_better is False and high > 0:
        low = max(low, -3 * high)
    elif higher_is_better and low < 0:
        high = min(high, -3 * low)
    pad = 0.06 * (high - low) or 1e-6
    return low - pad, high + pad


def focus(curves: dict[str, Series], higher_is_better: bool | None) -> Limits | None:
    """Limits of the axis if the interesting part would fill less than half of it, else None."""
    if higher_is_better is None:
        return None
    sign = -1.0 if higher_is_better else 1.0
    finite = [sign * value for curve in curves.values() for _, value in curve if math.isfinite(value)]
    live = [(step, sign * value) for step, value in curves[LIVE] if math.isfinite(value)]
    late = [value for step, value in live if step >= curves[LIVE][-1][0] / 4]
    best, worst = min(finite), max(late, default=max(finite))
    if worst <= best or max(finite) - best <= 2 * (worst - best):
        return None
    pad = 0.08 * (worst - best)
    low, high = sorted((sign * (best - pad), sign * (worst + pad)))
    return low, high


def _visible(curves: dict[str, Series], limits: Limits | None) -> set[tuple[str, int]]:
    low, high = limits or (-math.inf, math.inf)
    return {(name, step) for name, curve in curves.items() for step, value in curve if low <= value <= high}


def draw_over_decay(run: Run, metric: str, path: Path) -> bool:
    """`metric` at the last evaluation over the averages' horizons 1 / (1 - decay), the live weights as a line.

    The decay is the one in force at the end, which a rule that varies it logs as `ema/<name>/decay`.

    Returns:
        False if fewer than two averages have a decay below 1 and a finite value.
    """
    last = {
        name: curve[-1][1]
        for name in [LIVE, *run.averages]
        if (curve := _finite(run.evaluation(name, metric)))
    }
    points = sorted(
        (1 / (1 - decay[-1][1]), last[name], name)
        for name in run.averages
        if name in last and (decay := _finite(run.series(f"ema/{name}/decay"))) and 0 <= decay[-1][1] < 1
    )
    if len(points) < 2:
        return False

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(
            [x for x, _, _ in points], [y for _, y, _ in points], color="#5D5D5D", linewidth=1.2, zorder=1
        )
        for x, y, name in points:
            look = line_style(name, run.averages) | {"linestyle": "", "markersize": 8}
            axes.plot(x, y, label=f"{label(name)}: {value_text(y)}", **look)
        if LIVE in last:
            axes.axhline(
                last[LIVE],
                color="black",
                linewidth=2,
                linestyle="--",
                label=f"{LIVE}: {value_text(last[LIVE])}",
            )
        axes.set_xscale("log")
        axes.set_xlabel("horizon 1 / (1 - decay) at the end (optimizer steps)")
        axes.set_ylabel(f"last evaluation {run.named(metric)}")
        axes.margins(0.1)
        _finish(figure, [axes], columns=3, xlabel=False)

    _save(path, draw, height=4.6)
    return True


def draw_divergence(run: Run, path: Path) -> bool:
    """‖EMA - live‖ / ‖live‖ of every average over steps.

    Returns:
        False if none was logged.
    """
    curves = {name: curve for name in run.averages if (curve := _finite(run.series(f"ema/{name}/rel_l2")))}
    if not curves:
        return False
    # An average equals the live weights until it starts: no place for a 0 on a logarithmic axis.
    positive = [value for curve in curves.values() for _, value in curve if value > 0]
    logarithmic = bool(positive) and max(positive) > 10 * min(positive)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name, curve in curves.items():
            kept = [(step, value) for step, value in curve if value > 0 or not logarithmic]
            sparse = max(1, len(kept) // 12)
            axes.plot(*_columns(kept), label=label(name), markevery=sparse, **line_style(name, run.averages))
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        else:
            axes.set_ylim(bottom=0)
        axes.set_ylabel("divergence ‖EMA - live‖ / ‖live‖")
        _finish(figure, [axes], columns=3)

    _save(path, draw, height=4.6)
    return True


def draw_comparison(rows: Sequence[GroupRow], path: Path) -> bool:
    """The rows of a comparison as dots on one axis (the first metric's), with the standard deviation over runs.

    Returns:
        False if there is nothing finite to draw, or more rows than a picture can hold.
    """
    rows = [row for row in rows if row.metric == rows[0].metric and math.isfinite(row.last)]
    if not 0 < len(rows) <= MAX_ROWS:
        return False
    names = list(dict.fromkeys(row.weights for row in rows if row.weights != LIVE))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        places: dict[str, float] = {}
        for number, row in enumerate(rows):
            # Lines of one group lie close, groups apart.
            place = number + 0.6 * len(dict.fromkeys(other.group for other in rows[: number + 1]))
            spread = row.spread if row.spread is not None and math.isfinite(row.spread) else 0.0
            look = line_style(row.weights, names) | {"linestyle": ""}
            name = (
                label(row.weights) if all(row.weights != other.weights for other in rows[:number]) else None
            )
            axes.errorbar(row.last, place, xerr=spread, capsize=3, label=name, **look)
            places.setdefault(row.group, place)
        axes.set_yticks(list(places.values()), [shorten(group, 40, placeholder=" …") for group in places])
        axes.invert_yaxis()
        axes.set_xlabel(f"last evaluation {rows[0].metric}, mean ± standard deviation over runs")
        _finish(figure, [axes], columns=4, xlabel=False)

    _save(path, draw, height=1.6 + 0.3 * len(rows))
    return True


def _finite(series: Series) -> Series:
    return [(step, value) for step, value in series if math.isfinite(value)]


def _columns(series: Series) -> tuple[list[int], list[float]]:
    return [step for step, _ in series], [value for _, value in series]


def _finish(figure: Figure, panels: Sequence[Axes], *, columns: int, xlabel: bool = True) -> None:
    for axes in panels:
        axes.grid(True, color="#DDDDDD", linewidth=0.8)
    if xlabel:
        panels[-1].set_xlabel(STEPS)
        panels[-1].xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False
    )


def _save(path: Path, draw: Callable[[Figure], None], *, height: float) -> None:
    content = io.BytesIO()
    with rc_context(RC):
        figure = Figure(figsize=(6.4, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.savefig(content, format="png", metadata={"Software": None})
    write_atomically(path, content.getvalue())
