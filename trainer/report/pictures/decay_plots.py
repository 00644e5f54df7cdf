"""Pictures over the length of the average: the last evaluation with its optimum, and decay × step."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from trainer.report.best_decay import Optimum, decay_text, horizons_of, optimum
from trainer.report.group import Group, mean_over_seeds
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
from trainer.report.runs import LIVE
from trainer.report.text.table import direction_text, display_name, format_value
from trainer.report.verdicts import Row
from trainer.rundir.records import Series

MAX_LABEL_LINE = 40
"""Characters of a line of a group's name in a legend."""
MAX_ROW_LINE = 26
"""Characters of a line of an average's name beside a heat map."""
MAX_CELLS = 60
"""Evaluations that a heat map shows: more are narrower than a pixel's dot."""
MAX_NAMED = 8
"""Horizons that are named by their decays; more, or closer ones, get round numbers."""
MIN_AXIS_IN = 4.8
"""Inches that the axis of horizons has at least."""


def draw_over_decay(drawn: Sequence[tuple[Group, Sequence[Row]]], metric: str, path: Path) -> bool:
    """`metric` at the last evaluation over the horizons 1 / (1 - decay) of the averages, one line a group.

    The bars are 95 % intervals of the paired gap to the live weights, which stand as a horizontal line. Of a single
    group the span in which the optimum may lie is shaded (`trainer.report.best_decay.Optimum`).

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
                look = line_style(group.name, names)
                axes.errorbar(*_points(points), capsize=3, label=text, **look)
        _label_decays(axes, tested)
        group = lines[0][0]
        way = direction_text(group.higher_is_better(metric))
        axes.set_ylabel(f"last evaluation {group.with_unit(metric)}" + (f"\n{way}" if way else ""))
        finish_figure(figure, [[axes]], columns=2, steps=False)

    save(path, draw, height=4.4)
    return True


def _points(points: Sequence[tuple[float, Row]]) -> tuple[list[float], list[float], list[float]]:
    """Horizons, values, and half of the interval of each gap."""
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
        look = line_style(row.weights, group.averages) | {"linestyle": "", "markersize": 8}
        off = limits is not None and not limits[0] <= middle <= limits[1]
        text = f"{display_name(row.weights)}: {format_value(middle)}" + " (off axis)" * off
        axes.errorbar(horizon, middle, yerr=half, capsize=4, label=text, **look)
    if limits is not None:
        axes.set_ylim(*limits)
    if math.isfinite(live):
        axes.axhline(
            live, color="black", linewidth=2, linestyle="--", label=f"{LIVE}: {format_value(live)}", zorder=1
        )
    best = optimum(group, rows)
    if best is not None:
        _shade(axes, best, x)


def limits_near_live(values: Sequence[float], live: float, higher_is_better: bool) -> Limits | None:
    """Limits of the axis where averages far worse than the live weights would flatten all others; else None.

    Args:
        values: of the averages, finite.
        live: of the live weights; NaN if they were not evaluated.
        higher_is_better: direction of both.
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


def _shade(axes: Axes, best: Optimum, x: Sequence[float]) -> None:
    low, high = best.low or min(x) / 2, best.high or max(x) * 2
    axes.axvspan(
        low,
        high,
        facecolor="#EEEEEE",
        edgecolor="#AAAAAA",
        hatch="//",
        linewidth=0,
        zorder=0,
        label="where the optimum may lie (95 %)",
    )
    axes.set_xlim(min(x) / 2, max(x) * 2)


def _label_decays(axes: Axes, tested: Sequence[float]) -> None:
    texts = [f"{decay_text(h)}\n({h:.4g})" for h in tested]
    widest = CHARACTER_IN * max(len(line) for text in texts for line in text.split("\n"))
    low, high = axes.get_xlim()
    nearest = np.diff(np.log(tested)).min(initial=math.inf) / math.log(high / low) * MIN_AXIS_IN
    if len(tested) <= MAX_NAMED and nearest > widest:
        axes.set_xticks(list(tested), texts)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("decay at the end (horizon 1 / (1 - decay), optimizer steps)")
    else:
        axes.set_xlabel("horizon 1 / (1 - decay) at the end (optimizer steps)")


def draw_heat_map(group: Group, metric: str, path: Path) -> bool:
    """`metric` of every average over steps: rows by rising horizon, the best average of each step marked.

    Lightness alone tells the values (the map is cividis; dark is good), hatching where an average is worse than live.

    Returns:
        False with fewer than two averages that have a horizon, or fewer than three evaluations: the curves tell two.
    """
    found, higher = group.evaluations(metric), group.higher_is_better(metric)
    names = sorted((name for name in found.values if name in group.horizons), key=group.horizons.__getitem__)
    if len(names) < 2 or len(found.steps) < 3 or higher is None:
        return False
    places = np.unique(np.linspace(0, len(found.steps) - 1, MAX_CELLS).round().astype(int))
    means = {name: Series(found.steps, mean_over_seeds(found.values[name])) for name in found.values}
    values = np.array([means[name].values[places] for name in names])
    values[~np.isfinite(values)] = np.nan
    if np.isnan(values).all():
        return False
    limits = focus_limits(means, higher) if LIVE in means and len(means[LIVE].finite().steps) else None
    labels = [wrap_text(display_name(name), MAX_ROW_LINE) for name in names]
    row_in = max(0.45, LINE_IN * max(text.count("\n") + 2 for text in labels))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        columns = np.arange(len(places) + 1) - 0.5
        edges = np.arange(len(names) + 1) - 0.5
        low, high = limits or (np.nanmin(values), np.nanmax(values))
        shades = "cividis_r" if higher else "cividis"
        mesh = axes.pcolormesh(columns, edges, np.ma.masked_invalid(values), cmap=shades, vmin=low, vmax=high)
        if LIVE in means:
            gap = values - means[LIVE].values[places]
            worse = np.ma.masked_where(~((gap < 0) if higher else (gap > 0)), gap)
            axes.pcolor(columns, edges, worse, hatch="///", facecolor="none", edgecolor="black", linewidth=0)
        cost = np.where(np.isnan(values), np.inf, -values if higher else values)
        there = np.isfinite(cost.min(axis=0))
        axes.plot(
            np.flatnonzero(there),
            cost.argmin(axis=0)[there],
            linestyle="",
            marker="o",
            markersize=5,
            color="white",
            markeredgecolor="black",
            label="best average of the step",
        )
        axes.set_yticks(range(len(names)), labels)
        shown = np.unique(np.linspace(0, len(places) - 1, 6).round().astype(int))
        axes.set_xticks(shown, [str(found.steps[places[place]]) for place in shown])
        axes.set_xlabel(STEPS + ("; hatched: worse than live" if LIVE in means else ""))
        axes.set_ylabel("longer average →")
        bar = figure.colorbar(mesh, ax=axes, fraction=0.06, pad=0.03, extend="both" if limits else "neither")
        bar.set_label(f"evaluation {group.with_unit(metric)}\n{direction_text(higher)}")
        finish_figure(figure, [[axes]], steps=False, right_in=y_label_width_in(bar.ax))
        axes.grid(False)

    save(path, draw, height=2.0 + row_in * len(names))
    return True
