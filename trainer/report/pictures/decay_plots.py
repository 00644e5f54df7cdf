"""Figures over the horizon of the averages: the last evaluation with its optimum, and a heat map over steps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from trainer.report.best_decay import Optimum, decay_text, horizons_of, optimum
from trainer.report.format import (
    direction_text,
    display_name,
    format_interval,
    format_mean,
    format_value,
)
from trainer.report.group import Array, Group, mean_over_seeds
from trainer.report.pictures.plots import Limits, focus_limits
from trainer.report.pictures.style import (
    CHARACTER_IN,
    FAINT,
    HATCH,
    INK,
    LINE_IN,
    SHADE,
    STEPS,
    finish_figure,
    group_style,
    label_log_axis,
    line_style,
    save,
    wrap_text,
    y_label_width_in,
)
from trainer.report.pictures.svg import add_tips
from trainer.report.verdicts import Row, best_of
from trainer.rundir.columns import Series
from trainer.rundir.keys import LIVE, raced

MAX_LABEL_LINE = 40
"""Most characters in a line of a group's name in a legend."""
MAX_ROW_LINE = 26
"""Most characters in a line of an average's name beside a heat map."""
MAX_CELLS = 60
"""Most evaluations in a heat map; with more, a cell is narrower than the dot that marks the best."""
MAX_RACED = 0.5
"""Share of empty cells from which the heat map of a run with races is left out, because it shows hardly anything."""
MAX_DECAY_TICKS = 8
"""Most horizons with a tick labelled by the decay; more, or closer ones, get ticks at round horizons."""
MAX_Y_LINE = 22
"""Most characters in a line of the label of the values."""
DOT = "#fefefe"
"""Colour of the dots on a heat map: nearly white on a dark page, too, unlike the background."""
MIN_AXIS_IN = 4.8
"""Smallest width of the axis of horizons, in inches."""


def draw_over_decay(
    drawn: Sequence[tuple[Group, Sequence[Row]]],
    metric: str,
    path: Path,
    averages: Sequence[str] | None = None,
) -> str | None:
    """Draw `metric` at the last evaluation over the horizons of the averages, one line per group.

    Below are the paired gaps to the live weights with their 95 % intervals. For a single group, the live weights are a
    horizontal line and the interval of the optimum is shaded (`trainer.report.best_decay.Optimum`).

    Args:
        drawn: Groups and their rows.
        metric: Name of the metric.
        path: PNG file.
        averages: All averages of the page, which share the colours; None if the page has no others.

    Returns:
        The picture as SVG; None if no group has two averages with a decay below 1 and a finite value.
    """
    lines = [(group, rows, horizons_of(group, rows)) for group, rows in drawn]
    lines = [line for line in lines if len(line[2]) > 1]
    if not lines:
        return None
    drawn_rows = [row for _, _, points in lines for _, row in points]
    names = averages or list(dict.fromkeys(row.weights for row in drawn_rows))
    tested = sorted({horizon for _, _, points in lines for horizon, _ in points})
    limits = _common_limits(lines, bool(lines[0][0].higher_is_better(metric)))

    def draw(figure: Figure) -> None:
        values, gaps = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        values.set_xscale("log")
        values.margins(0.1)
        for index, (group, rows, points) in enumerate(lines):
            if len(lines) == 1:
                _draw_points(values, gaps, points, names, {"color": FAINT, "linewidth": 1.2}, limits)
                _draw_live_and_optimum(values, gaps, group, rows, points)
            else:
                # Intervals of the same average are beside one another.
                shift = 1.06 ** (index - (len(lines) - 1) / 2)
                _draw_points(values, gaps, points, names, group_style(index), limits, group.short_name, shift)
        off_axis = 0
        if limits is not None:
            shown = [row for row in drawn_rows if limits[0] <= row.last.value <= limits[1]]
            off_axis = len(drawn_rows) - len(shown)
            values.set_ylim(*limits)
            _limit_gaps(gaps, shown)
        _label_decays(gaps, tested)
        _label_values(values, gaps, lines[0][0], metric, off_axis * (len(lines) > 1))
        finish_figure(figure, [[values], [gaps]], steps=False)

    return save(path, draw, height=4.6)


def _common_limits(
    lines: Sequence[tuple[Group, Sequence[Row], Sequence[tuple[float, Row]]]], higher_is_better: bool
) -> Limits | None:
    """Return the limits of all groups on one axis; None if all values fit (see `limits_near_live`)."""
    rows = [row for _, own, _ in lines for row in own if row.weights == LIVE]
    live = best_of((row.last.value for row in rows), higher_is_better)
    values = [row.last.value for _, _, points in lines for _, row in points]
    return limits_near_live(values, math.nan if live is None else live, higher_is_better)


def _label_values(values: Axes, gaps: Axes, group: Group, metric: str, off_axis: int) -> None:
    """Label both axes of a picture over decays; `off_axis` averages are mentioned unless it is 0."""
    higher, name = group.higher_is_better(metric), wrap_text(f"last {group.with_unit(metric)}", MAX_Y_LINE)
    texts = (name, direction_text(higher), f"({off_axis} off the axis)" if off_axis else "")
    values.set_ylabel("\n".join(filter(None, texts)), fontsize="small")
    side = "" if higher is None else f"\n{'below' if higher else 'above'} 0: EMA is better"
    gaps.set_ylabel(f"live - EMA, 95 % CI{side}", fontsize="small")
    gaps.axhline(0, color=INK, linewidth=1)


def _draw_points(
    values: Axes,
    gaps: Axes,
    points: Sequence[tuple[float, Row]],
    averages: Sequence[str],
    style: Mapping[str, Any],
    limits: Limits | None,
    group: str | None = None,
    shift: float = 1.0,
) -> None:
    """Draw the values and the gaps of a group, the gaps at horizons times `shift`.

    If the `style` of the group has a marker, the points have it too, in the colours of the averages. The legend has the
    name of the group, or those of the averages without one.
    """
    x, y = [horizon for horizon, _ in points], [row.last.value for _, row in points]
    start = "" if group is None else f"{group}: "
    values.plot(x, y, **style, zorder=1, label=None if group is None else wrap_text(group, MAX_LABEL_LINE))
    marker = {"marker": style["marker"], "markersize": 7} if "marker" in style else {"markersize": 8}
    for horizon, (_, row) in zip(x, points, strict=True):
        own = line_style(row.weights, averages) | {"linestyle": ""} | marker
        value, gap = row.last.value, row.last.gap
        off_axis = limits is not None and not limits[0] <= value <= limits[1]
        text = f"{display_name(row.weights)}: {format_value(value)}" + " (off axis)" * off_axis
        values.plot([horizon], [value], label=text if group is None else None, **own)
        if gap is not None and math.isfinite(gap.mean):
            low, high = gap.interval
            place = [horizon * shift]
            gaps.errorbar(place, gap.mean, yerr=(high - low) / 2, capsize=4, **own | {"markersize": 5})
            text = f"{start}live - {display_name(row.weights)} {format_interval(gap)}"
            add_tips(gaps, place, [gap.mean], [text])
    tips = [f"{start}{display_name(row.weights)} {format_mean(row.last)}" for _, row in points]
    add_tips(values, x, y, tips)


def _draw_live_and_optimum(
    values: Axes, gaps: Axes, group: Group, rows: Sequence[Row], points: Sequence[tuple[float, Row]]
) -> None:
    live = next((row.last.value for row in rows if row.weights == LIVE), math.nan)
    if math.isfinite(live):
        text = f"{LIVE}: {format_value(live)}"
        values.axhline(live, color=INK, linewidth=2, linestyle="--", label=text, zorder=1)
    best = optimum(group, rows)
    if best is not None:
        x = [horizon for horizon, _ in points]
        _shade_optimum(values, best, x, "95 % interval of the optimum")
        _shade_optimum(gaps, best, x, None)


def _limit_gaps(axes: Axes, shown: Sequence[Row]) -> None:
    """Set the limits of the gaps to those of the values that are on the axis above, and to 0."""
    intervals = [row.last.gap.interval for row in shown if row.last.gap is not None]
    ends = [0.0, *(end for interval in intervals for end in interval if math.isfinite(end))]
    if max(ends) > min(ends):
        pad = 0.12 * (max(ends) - min(ends))
        axes.set_ylim(min(ends) - pad, max(ends) + pad)


def limits_near_live(values: Sequence[float], live: float, higher_is_better: bool) -> Limits | None:
    """Return limits of the y axis without averages far worse than the live weights and the best two averages.

    Args:
        values: Finite values of the averages.
        live: Value of the live weights; NaN if they were not evaluated.
        higher_is_better: Direction of the metric.

    Returns:
        None if all values fit on one axis.
    """
    sign = -1.0 if higher_is_better else 1.0
    costs = sorted(sign * value for value in values)
    worst = max([*costs[:2], *([sign * live] if math.isfinite(live) else [])])
    best = min(costs[0], worst, sign * live if math.isfinite(live) else math.inf)
    reach = 4 * (worst - best)
    if not 0 < reach < costs[-1] - best:
        return None
    low, high = sorted((sign * (best - reach / 8), sign * (best + reach)))
    return low, high


def _shade_optimum(axes: Axes, best: Optimum, x: Sequence[float], text: str | None) -> None:
    low, high = best.low or min(x) / 2, best.high or max(x) * 2
    axes.axvspan(low, high, facecolor=SHADE, edgecolor=HATCH, hatch="//", linewidth=0, zorder=0, label=text)
    axes.set_xlim(min(x) / 2, max(x) * 2)


def _label_decays(axes: Axes, tested: Sequence[float]) -> None:
    texts = [f"{decay_text(h)}\n({h:.4g})" for h in tested]
    widest = CHARACTER_IN * max(len(line) for text in texts for line in text.split("\n"))
    low, high = axes.get_xlim()
    nearest = np.diff(np.log(tested)).min(initial=math.inf) / math.log(high / low) * MIN_AXIS_IN
    if len(tested) <= MAX_DECAY_TICKS and nearest > widest:
        axes.set_xticks(list(tested), texts)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("decay at the end (horizon 1 / (1 - decay), optimizer steps)")
    else:
        label_log_axis(axes.xaxis, high / low)
        axes.set_xlabel("horizon 1 / (1 - decay) at the end (optimizer steps)")


@dataclass(frozen=True)
class _HeatMap:
    """Values of every average with a horizon, at the shown evaluations."""

    names: list[str]
    """Averages by increasing horizon; the rows of the map."""
    steps: NDArray[np.int64]
    """Steps of the shown evaluations; the columns of the map."""
    values: Array
    """`[averages, steps]`, mean over the seeds; NaN if not finite."""
    live: Array | None
    """`[steps]` of the live weights, None if they were not evaluated."""
    limits: Limits | None
    """Range of the colours; None uses all values."""
    higher: bool


def _heat_map_of(group: Group, metric: str) -> _HeatMap | None:
    """Return the data of a heat map; None if there is too little to draw (see `draw_heat_map`)."""
    evaluations, higher = group.evaluations(metric), group.higher_is_better(metric)
    names = [name for name in evaluations.values if name in group.horizons]
    names.sort(key=group.horizons.__getitem__)
    if len(names) < 2 or len(evaluations.steps) < 3 or higher is None:
        return None
    columns = np.unique(np.linspace(0, len(evaluations.steps) - 1, MAX_CELLS).round().astype(int))
    means = {
        name: Series(evaluations.steps, mean_over_seeds(values))
        for name, values in evaluations.values.items()
    }
    values = np.array([means[name].values[columns] for name in names])
    values[~np.isfinite(values)] = np.nan
    empty = np.isnan(values).mean()
    if empty == 1 or (empty >= MAX_RACED and any(raced(run.columns) for run in group.runs)):
        return None
    limits = focus_limits(means, higher) if LIVE in means and len(means[LIVE].finite().steps) else None
    live = means[LIVE].values[columns] if LIVE in means else None
    return _HeatMap(names, evaluations.steps[columns], values, live, limits, higher)


def draw_heat_map(group: Group, metric: str, path: Path) -> str | None:
    """Draw `metric` of every average over steps as a map whose rows have increasing horizons.

    Dark cells (cividis) are good, hatched cells are worse than the live weights, and a dot marks the best average of
    each step.

    Returns:
        The picture as SVG; None for a metric without a direction, with fewer than two averages that have a horizon,
        with fewer than three evaluations, or if races left most cells empty.
    """
    heat_map = _heat_map_of(group, metric)
    if heat_map is None:
        return None
    labels = [wrap_text(display_name(name), MAX_ROW_LINE) for name in heat_map.names]
    row_in = max(0.45, LINE_IN * max(text.count("\n") + 2 for text in labels))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        mesh = _draw_cells(axes, heat_map)
        _mark_best(axes, heat_map)
        for row, name in enumerate(heat_map.names):
            cells = zip(heat_map.steps, heat_map.values[row], strict=True)
            texts = [f"{display_name(name)} at step {step}: {format_value(value)}" for step, value in cells]
            add_tips(axes, np.arange(len(texts)), np.full(len(texts), row), texts)
        axes.set_yticks(range(len(labels)), labels)
        steps = heat_map.steps
        shown = np.unique(np.linspace(0, len(steps) - 1, 6).round().astype(int))
        axes.set_xticks(shown, [str(steps[index]) for index in shown])
        axes.set_xlabel(STEPS + ("" if heat_map.live is None else "; hatched: worse than live"))
        axes.set_ylabel("longer average →")
        extend = "both" if heat_map.limits else "neither"
        bar = figure.colorbar(mesh, ax=axes, fraction=0.06, pad=0.03, extend=extend)
        bar.set_label(f"evaluation {group.with_unit(metric)}\n{direction_text(heat_map.higher)}")
        finish_figure(figure, [[axes]], steps=False, right_in=y_label_width_in(bar.ax))
        axes.grid(False)

    return save(path, draw, height=2.0 + row_in * len(labels))


def _draw_cells(axes: Axes, heat_map: _HeatMap) -> Any:
    """Draw coloured cells, hatched where an average is worse than live; return the mesh for the colour bar."""
    values, higher = heat_map.values, heat_map.higher
    rows, columns = values.shape
    edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
    low, high = heat_map.limits or (np.nanmin(values), np.nanmax(values))
    colours = "cividis_r" if higher else "cividis"
    mesh = axes.pcolormesh(*edges, np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=high)
    if heat_map.live is not None:
        gap = values - heat_map.live
        worse = np.ma.masked_where(~((gap < 0) if higher else (gap > 0)), gap)
        axes.pcolor(*edges, worse, hatch="///", facecolor="none", edgecolor="black", linewidth=0)
    return mesh


def _mark_best(axes: Axes, heat_map: _HeatMap) -> None:
    values = heat_map.values
    cost = np.where(np.isnan(values), np.inf, -values if heat_map.higher else values)
    has_value = np.isfinite(cost.min(axis=0))
    columns, rows = np.flatnonzero(has_value), cost.argmin(axis=0)[has_value]
    label = "best average of the step"
    axes.plot(columns, rows, "o", markersize=5, color=DOT, markeredgecolor="black", label=label)
