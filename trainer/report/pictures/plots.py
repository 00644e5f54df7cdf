"""Figures over steps (evaluations, gaps, divergence) and over the groups of a comparison."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from trainer.report.comparison import Comparison
from trainer.report.format import direction_text, display_name, format_mean, format_value
from trainer.report.group import Array, Evaluations, Group, mean_over_seeds
from trainer.report.pictures.style import (
    INK,
    fill_band,
    finish_figure,
    label_log_axis,
    line_style,
    plot_line,
    save,
    wrap_text,
)
from trainer.report.pictures.svg import add_tips
from trainer.report.statistics import ALPHA, one_seed_estimate, t_quantile
from trainer.report.verdicts import Row
from trainer.rundir.columns import Series
from trainer.rundir.keys import LIVE

MAX_BARS = 40
"""Most evaluations with an error bar each; more are drawn with a band."""
MAX_ROWS = 40
"""Most rows in the figure of a comparison."""
MAX_LABEL_LINE = 26
"""Most characters in a line of a group's name beside its rows."""
LABEL_LINE_ROWS = 0.85
"""Height of such a line, in rows."""
MAX_NAMES = 62
"""Most characters of the names of all weights below a figure."""

Limits = tuple[float, float]


@dataclass(frozen=True)
class _Curves:
    """Data of one metric of a group, ready to draw."""

    group: Group
    metric: str
    evaluations: Evaluations
    means: dict[str, Series]
    """Mean over the seeds for each weights with a finite value, the live weights first."""
    limits: Limits | None
    """Limits of the y axis; None shows all values."""
    averages: Sequence[str]
    """All averages of the page, which share the colours."""
    single: bool
    """Whether there is only one evaluation; the x axis then shows the weights side by side instead of steps."""

    @property
    def higher(self) -> bool | None:
        return self.group.higher_is_better(self.metric)

    def x(self, name: str, steps: Array | NDArray[np.int64]) -> Array | NDArray[np.int64]:
        """Return the x positions of the values of some weights."""
        return np.full(len(steps), list(self.means).index(name)) if self.single else steps

    def off_axis(self, name: str) -> bool:
        """Return whether the last value of some weights is outside the limits of the y axis."""
        low, high = self.limits or (-math.inf, math.inf)
        return not low <= float(self.means[name].values[-1]) <= high

    def label_weights(self, axes: Axes) -> bool:
        """Label the x axis of a single evaluation; return whether the names of the weights fit."""
        names = [display_name(name) for name in self.means]
        fit = max(map(len, names)) * len(names) <= MAX_NAMES
        axes.set_xticks(range(len(names)) if fit else [], names if fit else [], fontsize="small")
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_xlabel(f"the only evaluation: step {self.evaluations.steps[0]}")
        return fit


def _curves_of(group: Group, metric: str, averages: Sequence[str] | None) -> _Curves | None:
    """Return the curves of a metric; None without an evaluation of the live weights."""
    evaluations = group.evaluations(metric)
    steps = evaluations.steps
    means = {
        name: curve
        for name, values in evaluations.values.items()
        if len((curve := Series(steps, mean_over_seeds(values)).finite()).steps)
    }
    if LIVE not in means:
        return None
    # Two evaluations have no first quarter to leave out.
    limits = focus_limits(means, group.higher_is_better(metric)) if len(steps) > 2 else None
    return _Curves(group, metric, evaluations, means, limits, averages or group.averages, len(steps) == 1)


def draw_curves(group: Group, metric: str, path: Path, averages: Sequence[str] | None = None) -> str | None:
    """Draw `metric` of all weights over steps, and below it each average's gap with its 95 % interval.

    Several seeds are drawn as their mean with a band of one standard deviation. If extreme values would flatten the
    other curves (an untrained model, an average that hardly moved), the axis only shows values at least as good as
    those of the live weights after a quarter of the steps. The legend lists the curves that end outside.

    Args:
        group: Runs to draw.
        metric: Name of the metric.
        path: PNG file.
        averages: All averages of the page, which share the colours; None if the page has no others.

    Returns:
        The picture as SVG; None if there is no evaluation to draw.
    """
    curves = _curves_of(group, metric, averages)
    if curves is None:
        return None
    logged = curves.evaluations.gaps
    gaps = {name: _gap(curves, name) for name in curves.means if name in logged}
    gaps = {name: pair for name, pair in gaps.items() if np.isfinite(pair[0]).any()}

    def draw(figure: Figure) -> None:
        ratios = [3, 2] if gaps else [3]
        panels = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        _draw_values(panels[0], curves)
        name, higher = f"evaluation {group.with_unit(metric)}", curves.higher
        panels[0].set_ylabel("\n".join(filter(None, (name, direction_text(higher)))))
        if gaps:
            low, high = _draw_gaps(panels[1], curves, gaps)
            panels[1].set_ylim(*_gap_limits(low, high, higher))
            side = "" if higher is None else f"\n{'below' if higher else 'above'} 0: EMA is better"
            panels[1].set_ylabel(f"live - EMA, 95 % CI{side}", fontsize="small")
        has_names = curves.single and curves.label_weights(panels[-1])
        finish_figure(figure, [[axes] for axes in panels], steps=not curves.single, legend=not has_names)

    return save(path, draw, height=6.0 if gaps else 4.0)


def draw_metrics(group: Group, metrics: Sequence[str], path: Path) -> str | None:
    """Draw a small panel for each of `metrics`: the live weights and every average over steps.

    Returns:
        The picture as SVG; None if there is nothing to draw.
    """
    drawn = [curves for metric in metrics if (curves := _curves_of(group, metric, None)) is not None]
    if not drawn:
        return None
    rows, single = math.ceil(len(drawn) / 2), all(curves.single for curves in drawn)
    drawn = [replace(curves, single=single) for curves in drawn]

    def draw(figure: Figure) -> None:
        panels = figure.subplots(rows, 2 if len(drawn) > 1 else 1, squeeze=False)
        for axes, curves in zip(panels.flat, drawn, strict=False):
            _draw_values(axes, curves, label_off_axis=False)  # the legend is common to all panels
            outside = sum(map(curves.off_axis, curves.means))
            subtitle = direction_text(curves.higher) or "no verdict"
            subtitle += f"; {outside} off the axis" if outside else ""
            axes.set_title(f"{group.with_unit(curves.metric)}\n{subtitle}", fontsize="small")
            axes.tick_params(labelsize="small")
            if single:
                axes.set_xticks([])
                axes.set_xlabel(f"the only evaluation: step {curves.evaluations.steps[0]}", fontsize="small")
        for axes in panels.flat[len(drawn) :]:
            axes.remove()
        used = [list(row)[: len(drawn) - 2 * index] for index, row in enumerate(panels)]
        finish_figure(figure, used, steps=not single)

    return save(path, draw, height=0.6 + 2.3 * rows)


def _draw_values(axes: Axes, curves: _Curves, *, label_off_axis: bool = True) -> None:
    group, limits = curves.group, curves.limits
    for name, curve in curves.means.items():
        text = display_name(name)
        if label_off_axis and curves.off_axis(name):
            text += f" (off axis: {format_value(float(curve.values[-1]))})"
        style = line_style(name, curves.averages)
        x = curves.x(name, curve.steps)
        plot_line(axes, x, curve.values, label=text, **style)
        tips = _tips(display_name(name), curve.steps, map(format_value, curve.values))
        add_tips(axes, x, curve.values, tips)
        if len(group.seeds) > 1:
            _draw_band(axes, curves, name, style["color"])
    if limits is not None:
        axes.set_ylim(*limits)
    if curves.single:
        axes.axhline(float(curves.means[LIVE].values[-1]), color=INK, linewidth=1, linestyle=":")


def _draw_band(axes: Axes, curves: _Curves, name: str, colour: str) -> None:
    """Draw one standard deviation over the seeds to each side, at steps where every seed was evaluated."""
    values = curves.evaluations.values[name]
    complete = np.isfinite(values).all(axis=0)
    mean, sd = values[:, complete].mean(axis=0), values[:, complete].std(axis=0, ddof=1)
    x = curves.x(name, curves.evaluations.steps[complete])
    if curves.single:
        axes.errorbar(x, mean, yerr=sd, capsize=3, color=colour, linestyle="")
    else:
        fill_band(axes, x, mean, sd, colour)


def _gap(curves: _Curves, name: str) -> tuple[Array, Array]:
    """Return the mean gap `[n]` and half its 95 % interval, over seeds or the samples of one seed."""
    evaluations = curves.evaluations
    gaps = _finite(evaluations.gaps[name])
    mean = mean_over_seeds(gaps)
    # If a seed or a run is missing at a step, its NaN removes the interval there.
    if len(gaps) == 1:
        samples = curves.group.runs[0].eval_samples(curves.metric)
        has_average = ~np.isnan(evaluations.run_gaps[name]).all(axis=1)
        runs, errors = (
            _finite(own[name][has_average]) for own in (evaluations.run_gaps, evaluations.run_errors)
        )
        if len(runs) == 1:
            return mean, errors[0] * _interval_factor(samples - 1)
        estimates = [one_seed_estimate(*column, samples) for column in zip(runs.T, errors.T, strict=True)]
        return mean, np.array([gap.se * _interval_factor(gap.df) for gap in estimates])
    return mean, gaps.std(axis=0, ddof=1) / math.sqrt(len(gaps)) * _interval_factor(len(gaps) - 1)


def _finite(values: Array) -> Array:
    return np.where(np.isfinite(values), values, np.nan)


def _interval_factor(df: float) -> float:
    """Return half the width of a 95 % interval in standard errors."""
    return t_quantile(ALPHA, df) if df >= 1 else math.nan


def _draw_gaps(axes: Axes, curves: _Curves, gaps: Mapping[str, tuple[Array, Array]]) -> Limits:
    """Draw the gaps, and return a range that contains 0 and the gaps.

    Gaps of values outside the axis of the panel above do not count, unless all values are outside.
    """
    inside: list[float] = []
    outside: list[float] = []
    evaluations, (low, high) = curves.evaluations, curves.limits or (-math.inf, math.inf)
    for name, (mean, half) in gaps.items():
        style = line_style(name, curves.averages)
        finite = np.isfinite(mean)
        x, middle, reach = curves.x(name, evaluations.steps[finite]), mean[finite], half[finite]
        if len(x) <= MAX_BARS:
            axes.errorbar(x, middle, yerr=reach, capsize=2, elinewidth=1.0, **style)
        else:
            plot_line(axes, x, middle, **style)
            fill_band(axes, x, middle, reach, style["color"])
        figures = (f"{value:+.4g} ± {about:.2g} (95 %)" for value, about in zip(middle, reach, strict=True))
        add_tips(axes, x, middle, _tips(f"live - {display_name(name)}", evaluations.steps[finite], figures))
        values = mean_over_seeds(evaluations.values[name])[finite]
        visible = (values >= low) & (values <= high)
        for part, ends in ((visible, inside), (~visible, outside)):
            around = np.nan_to_num(reach[part])
            ends += [*(middle[part] - around), *(middle[part] + around)]
    axes.axhline(0, color=INK, linewidth=1)
    shown = [0.0, *(inside or outside)]
    return float(min(shown)), float(max(shown))


def _gap_limits(low: float, high: float, higher_is_better: bool | None) -> Limits:
    """Return limits that show all gaps, but give at most three quarters of the axis to averages worse than live.

    Early in training an average lags far behind; the small gaps in its favour must stay visible.
    """
    if higher_is_better is False and high > 0:
        low = max(low, -3 * high)
    elif higher_is_better and low < 0:
        high = min(high, -3 * low)
    pad = 0.06 * (high - low) or 1e-6
    return low - pad, high + pad


def focus_limits(curves: Mapping[str, Series], higher_is_better: bool | None) -> Limits | None:
    """Return limits without the first quarter of the steps if its values would fill most of the axis.

    The first quarter is left out if its values would fill more than half of the axis.

    Returns:
        None if all values fit on one axis, or for a metric without a direction.
    """
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


def draw_divergence(group: Group, path: Path, averages: Sequence[str] | None = None) -> str | None:
    """Draw ‖EMA - live‖ / ‖live‖ of every average over steps, as the mean over seeds.

    Args:
        group: Runs to draw.
        path: PNG file.
        averages: All averages of the page, which share the colours; None if the page has no others.

    Returns:
        The picture as SVG; None if it was not logged.
    """
    curves = group.tracked("rel_l2")
    if not curves:
        return None
    # An average that has not started equals the live weights; a logarithmic axis cannot show this 0.
    values = np.concatenate([curve.values for curve in curves.values()])
    positive = values[values > 0]
    logarithmic = len(positive) > 0 and positive.max() > 10 * positive.min()

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name, curve in curves.items():
            shown = (curve.values > 0) | (not logarithmic)
            steps, distances = curve.steps[shown], curve.values[shown]
            style = line_style(name, averages or group.averages)
            plot_line(axes, steps, distances, label=display_name(name), **style)
            tips = _tips(display_name(name), steps, map("{:.4g}".format, distances))
            add_tips(axes, steps, distances, tips)
        if logarithmic:
            axes.set_yscale("log")
            label_log_axis(axes.yaxis, positive.max() / positive.min())
        else:
            axes.set_ylim(bottom=0)
        axes.set_ylabel("divergence ‖EMA - live‖ / ‖live‖")
        finish_figure(figure, [[axes]])

    return save(path, draw, height=4.2)


def draw_comparison(comparison: Comparison, path: Path, averages: Sequence[str]) -> str | None:
    """Draw the rows of the best groups as dots on one axis, with the standard deviation over seeds.

    Args:
        comparison: Comparison to draw.
        path: PNG file.
        averages: All averages of the page, which share the colours.

    Returns:
        The picture as SVG; None if there is no finite value to draw.
    """
    drawn = _drawn_groups(comparison)
    if not drawn:
        return None
    heights = [max(len(rows), LABEL_LINE_ROWS * (text.count("\n") + 1)) + 0.6 for text, rows in drawn]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        top, ticks, labelled = 0.0, [], set()
        for (group, rows), height in zip(drawn, heights, strict=True):
            ticks.append(top + (len(rows) - 1) / 2)
            for offset, row in enumerate(rows):
                style = line_style(row.weights, averages) | {"linestyle": ""}
                text = None if row.weights in labelled else display_name(row.weights)
                labelled.add(row.weights)
                axes.errorbar(
                    row.last.value, top + offset, xerr=row.last.sd or 0.0, capsize=3, label=text, **style
                )
            values = [row.last.value for row in rows]
            tips = [f"{group}: {display_name(row.weights)} {format_mean(row.last)}" for row in rows]
            add_tips(axes, values, np.arange(len(rows)) + top, tips)
            top += height
        axes.set_yticks(ticks, [text for text, _ in drawn])
        axes.invert_yaxis()
        name = f"last evaluation {comparison.groups[0].with_unit(comparison.metric)}"
        text = ", ".join(filter(None, (name, direction_text(comparison.higher_is_better))))
        shown = f"; the {len(drawn)} best of {len(comparison.groups)} groups"
        some = shown if len(drawn) < len(comparison.groups) else ""
        axes.set_xlabel(f"{text}\nmean ± SD over seeds{some}")
        finish_figure(figure, [[axes]], columns=4, steps=False)

    return save(path, draw, height=1.5 + 0.24 * sum(heights))


def _drawn_groups(comparison: Comparison) -> list[tuple[str, list[Row]]]:
    """Return (name, finite rows) of the best groups, in the order of the groups; as many as fit in MAX_ROWS."""
    return [
        (wrap_text(comparison.groups[index].short_name, MAX_LABEL_LINE), rows)
        for index in comparison.best_within(MAX_ROWS)
        if (rows := [row for row in comparison.rows[index] if math.isfinite(row.last.value)])
    ]


def _tips(name: str, steps: Iterable[float], values: Iterable[str]) -> list[str]:
    return [f"{name} at step {step:g}: {value}" for step, value in zip(steps, values, strict=True)]
