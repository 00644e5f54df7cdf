"""Figures over the horizon of the averages: the last evaluation with its optimum, and a heat map over steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from trainer.report.best_decay import Optimum, decay_text, horizons_of, optimum
from trainer.report.format import direction_text, display_name, format_value
from trainer.report.group import Array, Group, mean_over_seeds
from trainer.report.pictures.plots import Limits, focus_limits
from trainer.report.pictures.style import (
    CHARACTER_IN,
    LINE_IN,
    STEPS,
    finish_figure,
    line_style,
    save,
    wrap_text,
    y_label_width_in,
)
from trainer.report.verdicts import Row
from trainer.rundir.columns import Series
from trainer.rundir.keys import LIVE

MAX_LABEL_LINE = 40
"""Most characters in a line of a group's name in a legend."""
MAX_ROW_LINE = 26
"""Most characters in a line of an average's name beside a heat map."""
MAX_CELLS = 60
"""Most evaluations in a heat map; with more, a cell is narrower than the dot that marks the best."""
MAX_DECAY_TICKS = 8
"""Most horizons with a tick labelled by the decay; more, or closer ones, get ticks at round horizons."""
MIN_AXIS_IN = 4.8
"""Smallest width of the axis of horizons, in inches."""


def draw_over_decay(drawn: Sequence[tuple[Group, Sequence[Row]]], metric: str, path: Path) -> bool:
    """Draw `metric` at the last evaluation over the horizons of the averages, one line per group.

    Error bars are 95 % intervals of the paired gap to the live weights. For a single group, the live weights are a
    horizontal line and the interval of the optimum is shaded (`trainer.report.best_decay.Optimum`).

    Returns:
        False if no group has two averages with a decay below 1 and a finite value.
    """
    lines = [(group, rows, horizons_of(group, rows)) for group, rows in drawn]
    lines = [line for line in lines if len(line[2]) > 1]
    if not lines:
        return False
    tested = sorted({horizon for _, _, points in lines for horizon, _ in points})

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.margins(0.1)
        for group, rows, points in lines:
            if len(lines) == 1:
                _draw_group(axes, group, rows, points)
            else:
                names = [other.name for other, _, _ in lines]
                text = wrap_text(group.short_name, MAX_LABEL_LINE)
                axes.errorbar(*_points(points), capsize=3, label=text, **line_style(group.name, names))
        _label_decays(axes, tested)
        group = lines[0][0]
        direction = direction_text(group.higher_is_better(metric))
        text = f"last evaluation {group.with_unit(metric)}"
        axes.set_ylabel(text + (f"\n{direction}" if direction else ""))
        finish_figure(figure, [[axes]], columns=2, steps=False)

    save(path, draw, height=4.4)
    return True


def _points(points: Sequence[tuple[float, Row]]) -> tuple[list[float], list[float], list[float]]:
    """Return horizons, values, and half of the interval of each gap."""
    reach = []
    for _, row in points:
        low, high = row.last.gap.interval if row.last.gap else (math.nan, math.nan)
        reach.append((high - low) / 2)
    return [horizon for horizon, _ in points], [row.last.value for _, row in points], reach


def _draw_group(axes: Axes, group: Group, rows: Sequence[Row], points: Sequence[tuple[float, Row]]) -> None:
    x, y, reach = _points(points)
    live = next((row.last.value for row in rows if row.weights == LIVE), math.nan)
    limits = limits_near_live(y, live, bool(group.higher_is_better(rows[0].metric)))
    axes.plot(x, y, color="#5D5D5D", linewidth=1.2, zorder=1)
    for horizon, middle, half, (_, row) in zip(x, y, reach, points, strict=True):
        style = line_style(row.weights, group.averages) | {"linestyle": "", "markersize": 8}
        off_axis = limits is not None and not limits[0] <= middle <= limits[1]
        text = f"{display_name(row.weights)}: {format_value(middle)}" + " (off axis)" * off_axis
        axes.errorbar(horizon, middle, yerr=half, capsize=4, label=text, **style)
    if limits is not None:
        axes.set_ylim(*limits)
    if math.isfinite(live):
        axes.axhline(
            live, color="black", linewidth=2, linestyle="--", label=f"{LIVE}: {format_value(live)}", zorder=1
        )
    best = optimum(group, rows)
    if best is not None:
        _shade_optimum(axes, best, x)


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


def _shade_optimum(axes: Axes, best: Optimum, x: Sequence[float]) -> None:
    low, high = best.low or min(x) / 2, best.high or max(x) * 2
    axes.axvspan(
        low,
        high,
        facecolor="#EEEEEE",
        edgecolor="#AAAAAA",
        hatch="//",
        linewidth=0,
        zorder=0,
        label="95 % interval of the optimum",
    )
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
    if np.isnan(values).all():
        return None
    limits = focus_limits(means, higher) if LIVE in means and len(means[LIVE].finite().steps) else None
    live = means[LIVE].values[columns] if LIVE in means else None
    return _HeatMap(names, evaluations.steps[columns], values, live, limits, higher)


def draw_heat_map(group: Group, metric: str, path: Path) -> bool:
    """Draw `metric` of every average over steps as a map whose rows have increasing horizons.

    Dark cells (cividis) are good, hatched cells are worse than the live weights, and a dot marks the best average of
    each step.

    Returns:
        False for a metric without a direction, with fewer than two averages that have a horizon, or with fewer than
        three evaluations.
    """
    heat_map = _heat_map_of(group, metric)
    if heat_map is None:
        return False
    labels = [wrap_text(display_name(name), MAX_ROW_LINE) for name in heat_map.names]
    row_in = max(0.45, LINE_IN * max(text.count("\n") + 2 for text in labels))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        mesh = _draw_cells(axes, heat_map)
        _mark_best(axes, heat_map)
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

    save(path, draw, height=2.0 + row_in * len(labels))
    return True


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
    axes.plot(
        np.flatnonzero(has_value),
        cost.argmin(axis=0)[has_value],
        linestyle="",
        marker="o",
        markersize=5,
        color="white",
        markeredgecolor="black",
        label="best average of the step",
    )
