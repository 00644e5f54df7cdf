"""Pictures over steps and over groups: evaluation curves with gaps, divergence, the groups of a comparison."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from trainer.report.comparison import Comparison
from trainer.report.group import Array, Evaluations, Group, mean_over_seeds
from trainer.report.pictures.style import MAX_MARKERS, finish_figure, line_style, save, wrap_text
from trainer.report.runs import LIVE
from trainer.report.statistics import ALPHA, t_quantile
from trainer.report.text.table import direction_text, display_name, format_value
from trainer.rundir.records import Series

MAX_BARS = 40
"""Evaluations up to which every one has its own error bar; more make a band."""
MAX_LINES = 40
MAX_LABEL_LINE = 26
"""Characters of a line of a group's name beside its dots."""
LINES_A_LABEL = 0.85
"""Height of such a line, in dots."""
MAX_NAMES = 62
"""Characters that stand side by side below a picture."""

Limits = tuple[float, float]


@dataclass(frozen=True)
class _Curves:
    """One metric of a group, as it is drawn."""

    group: Group
    metric: str
    found: Evaluations
    means: dict[str, Series]
    """Over the seeds, of the weights that have a finite value; the live ones first."""
    limits: Limits | None
    """Of the axis; None shows all."""
    single: bool
    """Whether there is one evaluation alone: then the weights stand side by side, not one above the other."""

    @property
    def higher(self) -> bool | None:
        return self.group.higher_is_better(self.metric)

    def x(self, name: str, steps: Array | NDArray[np.int64]) -> Array | NDArray[np.int64]:
        """Where the values of some weights stand."""
        return np.full(len(steps), list(self.means).index(name)) if self.single else steps

    def off_axis(self, name: str) -> bool:
        """Whether the last value of some weights is."""
        low, high = self.limits or (-math.inf, math.inf)
        return not low <= float(self.means[name].values[-1]) <= high

    def label_x(self, axes: Axes) -> bool:
        """Say what the places of `x` mean that are no steps; whether there was room for the names of the weights."""
        names = [display_name(name) for name in self.means]
        fit = max(map(len, names)) * len(names) <= MAX_NAMES
        axes.set_xticks(range(len(names)) if fit else [], names if fit else [], fontsize="small")
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_xlabel(f"the only evaluation: step {self.found.steps[0]}")
        return fit


def _curves_of(group: Group, metric: str) -> _Curves | None:
    """None without an evaluation of the live weights."""
    found = group.evaluations(metric)
    means = {
        name: curve
        for name, values in found.values.items()
        if len((curve := Series(found.steps, mean_over_seeds(values)).finite()).steps)
    }
    if LIVE not in means:
        return None
    # Two evaluations have no first quarter to leave out.
    limits = focus_limits(means, group.higher_is_better(metric)) if len(found.steps) > 2 else None
    return _Curves(group, metric, found, means, limits, len(found.steps) == 1)


def draw_curves(group: Group, metric: str, path: Path) -> bool:
    """Evaluation `metric` of live and every average over steps, and below it each gap with its 95 % interval.

    Several seeds are drawn as their mean with a band of one standard deviation. A first evaluation of an untrained
    model, or an average that hardly moved, would flatten all the rest: then the axes show what is at least as good as
    the live weights were a quarter through, and the legend names what is off.

    Returns:
        False if there is nothing to draw (no evaluation).
    """
    curves = _curves_of(group, metric)
    if curves is None:
        return False
    gaps = {name: _gap(group, curves.found, name) for name in curves.means if name in curves.found.gaps}
    gaps = {name: pair for name, pair in gaps.items() if np.isfinite(pair[0]).any()}

    def draw(figure: Figure) -> None:
        ratios = [3, 2] if gaps else [3]
        panels = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        _draw_values(panels[0], curves)
        way = direction_text(curves.higher)
        panels[0].set_ylabel(f"evaluation {group.with_unit(metric)}" + (f"\n{way}" if way else ""))
        if gaps:
            low, high = _draw_gaps(panels[1], curves, gaps)
            panels[1].set_ylim(*_gap_limits(low, high, curves.higher))
            side = (
                "" if curves.higher is None else f"\n{'below' if curves.higher else 'above'} 0: EMA is better"
            )
            panels[1].set_ylabel(f"live - EMA, 95 % CI{side}", fontsize="small")
        named = curves.single and curves.label_x(panels[-1])
        finish_figure(figure, [[axes] for axes in panels], steps=not curves.single, legend=not named)

    save(path, draw, height=6.0 if gaps else 4.0)
    return True


def draw_metrics(group: Group, metrics: Sequence[str], path: Path) -> bool:
    """Each of `metrics` of live and every average over steps, side by side in small.

    Returns:
        False if there is nothing to draw.
    """
    drawn = [curves for metric in metrics if (curves := _curves_of(group, metric)) is not None]
    if not drawn:
        return False
    rows, single = math.ceil(len(drawn) / 2), all(curves.single for curves in drawn)
    drawn = [replace(curves, single=single) for curves in drawn]

    def draw(figure: Figure) -> None:
        panels = figure.subplots(rows, 2 if len(drawn) > 1 else 1, squeeze=False)
        for place, axes in enumerate(panels.flat):
            if place >= len(drawn):
                axes.remove()
                continue
            curves = drawn[place]
            _draw_values(axes, curves, label_off_axis=False)  # one legend for all panels
            away = sum(map(curves.off_axis, curves.means))
            told = [
                direction_text(curves.higher) or "no verdict",
                *[f"{away} off the axis"] * (away > 0),
            ]
            axes.set_title(f"{group.with_unit(curves.metric)}\n{'; '.join(told)}", fontsize="small")
            axes.tick_params(labelsize="small")
            if single:
                axes.set_xticks([])
                axes.set_xlabel(f"the only evaluation: step {curves.found.steps[0]}", fontsize="small")
        kept = [list(row)[: len(drawn) - 2 * place] for place, row in enumerate(panels)]
        finish_figure(figure, kept, steps=not single)

    save(path, draw, height=0.6 + 2.3 * rows)
    return True


def _draw_values(axes: Axes, curves: _Curves, *, label_off_axis: bool = True) -> None:
    group, limits = curves.group, curves.limits
    for name, curve in curves.means.items():
        away = label_off_axis and curves.off_axis(name)
        text = display_name(name) + (f" (off axis: {format_value(float(curve.values[-1]))})" if away else "")
        look = line_style(name, group.averages)
        x = curves.x(name, curve.steps)
        axes.plot(x, curve.values, label=text, markevery=_marker_interval(len(curve.steps)), **look)
        if len(group.seeds) > 1:
            _band(axes, curves, name, look["color"])
    if limits is not None:
        axes.set_ylim(*limits)
    if curves.single:
        axes.axhline(float(curves.means[LIVE].values[-1]), color="black", linewidth=1, linestyle=":")


def _band(axes: Axes, curves: _Curves, name: str, colour: str) -> None:
    """One standard deviation over the seeds to each side, where all were evaluated."""
    values = curves.found.values[name]
    whole = np.isfinite(values).all(axis=0)
    mean, sd = values[:, whole].mean(axis=0), values[:, whole].std(axis=0, ddof=1)
    x = curves.x(name, curves.found.steps[whole])
    if curves.single:
        axes.errorbar(x, mean, yerr=sd, capsize=3, color=colour, linestyle="")
    else:
        axes.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.12, linewidth=0)


def _gap(group: Group, found: Evaluations, name: str) -> tuple[Array, Array]:
    """Mean gap `[n]` and half of its 95 % interval: over seeds, or over the samples of a single run."""
    gaps = np.where(np.isinf(found.gaps[name]), np.nan, found.gaps[name])
    mean = mean_over_seeds(gaps)
    if len(gaps) == 1:
        errors = found.errors[name][0]
        return mean, np.where(np.isfinite(errors), errors, np.nan) * _factor(group.runs[0].eval_samples - 1)
    # NaN where a seed is missing: no interval there.
    return mean, gaps.std(axis=0, ddof=1) / math.sqrt(len(gaps)) * _factor(len(gaps) - 1)


def _factor(df: float) -> float:
    return t_quantile(ALPHA, df) if df >= 1 else math.nan


def _draw_gaps(axes: Axes, curves: _Curves, gaps: Mapping[str, tuple[Array, Array]]) -> Limits:
    """Draw the gaps; the range of those whose curves are on the axes above, or of all if none is, 0 included."""
    reaches: list[float] = []
    off_axis: list[float] = []
    found, (low, high) = curves.found, curves.limits or (-math.inf, math.inf)
    for name, (mean, half) in gaps.items():
        look = line_style(name, curves.group.averages)
        there = np.isfinite(mean)
        steps, middle, reach = curves.x(name, found.steps[there]), mean[there], half[there]
        if len(steps) <= MAX_BARS:
            axes.errorbar(steps, middle, yerr=reach, capsize=2, elinewidth=1.0, **look)
        else:
            axes.plot(steps, middle, markevery=_marker_interval(len(steps)), **look)
            axes.fill_between(
                steps, middle - reach, middle + reach, color=look["color"], alpha=0.15, linewidth=0
            )
        values = mean_over_seeds(found.values[name])[there]
        seen = (values >= low) & (values <= high)
        for part, collected in ((seen, reaches), (~seen, off_axis)):
            around = np.nan_to_num(reach[part])
            collected += [*(middle[part] - around), *(middle[part] + around)]
    axes.axhline(0, color="black", linewidth=1)
    shown = [0.0, *(reaches or off_axis)]
    return float(min(shown)), float(max(shown))


def _gap_limits(low: float, high: float, higher_is_better: bool | None) -> Limits:
    """All gaps, but an average's lag early on may fill at most three quarters: the question is who wins by how much."""
    if higher_is_better is False and high > 0:
        low = max(low, -3 * high)
    elif higher_is_better and low < 0:
        high = min(high, -3 * low)
    pad = 0.06 * (high - low) or 1e-6
    return low - pad, high + pad


def focus_limits(curves: Mapping[str, Series], higher_is_better: bool | None) -> Limits | None:
    """Limits of the axis if the interesting part would fill less than half of it, else None."""
    if higher_is_better is None:
        return None
    sign = -1.0 if higher_is_better else 1.0
    finite = np.concatenate([sign * curve.finite().values for curve in curves.values()])
    live = curves[LIVE].finite()
    late = sign * live.values[live.steps >= curves[LIVE].steps[-1] / 4]
    best, worst = float(finite.min()), float(late.max() if len(late) else finite.max())
    if worst <= best or float(finite.max()) - best <= 2 * (worst - best):
        return None
    pad = 0.08 * (worst - best)
    low, high = sorted((sign * (best - pad), sign * (worst + pad)))
    return low, high


def draw_divergence(group: Group, path: Path) -> bool:
    """‖EMA - live‖ / ‖live‖ of every average over steps, the mean over seeds.

    Returns:
        False if none was logged.
    """
    curves = group.tracked("rel_l2")
    if not curves:
        return False
    # An average equals the live weights until it starts: no place for a 0 on a logarithmic axis.
    every = np.concatenate([curve.values for curve in curves.values()])
    positive = every[every > 0]
    logarithmic = len(positive) > 0 and positive.max() > 10 * positive.min()

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name, curve in curves.items():
            kept = (curve.values > 0) | (not logarithmic)
            shown = Series(curve.steps[kept], curve.values[kept])
            axes.plot(
                *shown,
                label=display_name(name),
                markevery=_marker_interval(len(shown.steps)),
                **line_style(name, group.averages),
            )
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            if positive.max() < 300 * positive.min():
                axes.yaxis.set_minor_formatter("{x:g}")
            else:
                axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        axes.set_ylabel("divergence ‖EMA - live‖ / ‖live‖")
        finish_figure(figure, [[axes]])

    save(path, draw, height=4.2)
    return True


def draw_comparison(comparison: Comparison, path: Path) -> bool:
    """The lines of a comparison as dots on one axis, with the standard deviation over seeds; the best groups of many.

    Returns:
        False if there is nothing finite to draw.
    """
    kept: list[int] = []
    for place in comparison.ranked():
        if kept and sum(len(comparison.rows[n]) for n in [*kept, place]) > MAX_LINES:
            break
        kept.append(place)
    named = [
        (wrap_text(comparison.groups[place].short_name, MAX_LABEL_LINE), rows)
        for place in sorted(kept)
        if (rows := [row for row in comparison.rows[place] if math.isfinite(row.last.value)])
    ]
    if not named:
        return False
    names = list(dict.fromkeys(row.weights for _, rows in named for row in rows if row.weights != LIVE))
    heights = [max(len(rows), LINES_A_LABEL * (text.count("\n") + 1)) + 0.6 for text, rows in named]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        place, ticks, known = 0.0, [], set()
        for (_, rows), height in zip(named, heights, strict=True):
            ticks.append(place + (len(rows) - 1) / 2)
            for offset, row in enumerate(rows):
                look = line_style(row.weights, names) | {"linestyle": ""}
                text = None if row.weights in known else display_name(row.weights)
                known.add(row.weights)
                axes.errorbar(
                    row.last.value, place + offset, xerr=row.last.sd or 0.0, capsize=3, label=text, **look
                )
            place += height  # lines of one group lie close, groups apart
        axes.set_yticks(ticks, [text for text, _ in named])
        axes.invert_yaxis()
        way = direction_text(comparison.higher_is_better)
        title = comparison.groups[0].with_unit(comparison.metric)
        axes.set_xlabel(f"last evaluation {title}" + (f", {way}" if way else "") + "\nmean ± SD over seeds")
        finish_figure(figure, [[axes]], columns=4, steps=False)

    save(path, draw, height=1.5 + 0.24 * sum(heights))
    return True


def _marker_interval(points: int) -> int:
    return max(1, math.ceil(points / MAX_MARKERS))
