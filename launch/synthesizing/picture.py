"""Picture of the loss over the horizon of averages that were made after the run. matplotlib is imported only here."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from launch.synthesizing.trials import Trial, judge, shown
from trainer.report.format import format_value
from trainer.report.pictures.decay_plots import limits_near_live
from trainer.report.pictures.style import (
    FAINT,
    HATCH,
    INK,
    SHADE,
    finish_figure,
    line_style,
    save,
    wrap_text,
)
from trainer.report.pictures.svg import add_tips
from trainer.rundir.files import write_atomically
from trainer.rundir.keys import AVERAGE, LIVE

POINTS_BETWEEN = 24
"""Points of the curve between two averages."""
MAX_LABEL = 28
"""Most characters in a line of the legend."""
SPAN = 1.5
"""Free space on both sides of the horizons, as a factor."""

Array = NDArray[np.float64]


def draw(path: Path, trials: Sequence[Trial], metric: str, step: int, *, higher_is_better: bool) -> bool:
    """Draw the metric on half B over the horizon as PNG and SVG; return False if fewer than two averages have one.

    The made constant decays are joined by one curve. Among them, the horizons that half B does not show to be worse
    than the best one of half A are shaded. Stored averages and those of other rules are points. `path` is the PNG file;
    the SVG file has the same name.
    """
    finite = [trial for trial in trials if math.isfinite(trial.mean(1)) and math.isfinite(trial.mean(0))]
    points = sorted(((trial.horizon, trial) for trial in finite if trial.horizon), key=lambda one: one[0])
    curve = [(horizon, trial) for horizon, trial in points if trial.is_constant]
    if len(points) < 2:
        return False
    live = next((trial.mean(1) for trial in finite if trial.name == LIVE), math.nan)
    limits = limits_near_live([trial.mean(1) for _, trial in points], live, higher_is_better)

    def on(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_xscale("log")
        if math.isfinite(live):
            text = f"{LIVE}: {format_value(live)}"
            axes.axhline(live, color=INK, linewidth=2, linestyle="--", label=text, zorder=1)
        if len(curve) > 1:
            _draw_curve(axes, curve, higher_is_better)
        _draw_points(axes, points)
        axes.set_xlim(points[0][0] / SPAN, points[-1][0] * SPAN)
        if limits is not None:
            axes.set_ylim(*limits)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("horizon 1 / (1 - decay) (optimizer steps)")
        side = "higher" if higher_is_better else "lower"
        axes.set_ylabel(f"{metric} at step {step}, half B\n({side} is better)", fontsize="small")
        finish_figure(figure, [[axes]], columns=2, steps=False)

    svg = save(path, on, height=3.4)
    write_atomically(path.with_suffix(".svg"), svg + "\n")
    return True


def _draw_curve(axes: Axes, curve: Sequence[tuple[float, Trial]], higher_is_better: bool) -> None:
    verdict = judge([trial for _, trial in curve], higher_is_better=higher_is_better)
    fine = {verdict.best.name, *verdict.may_be_best}
    inside = [horizon for horizon, trial in curve if trial.name in fine]
    low, high = min(inside), max(inside)
    if low == high:  # a line would be invisible
        low, high = low / 1.03, high * 1.03
    text = wrap_text("decays that half B does not show to be worse", MAX_LABEL)
    axes.axvspan(low, high, facecolor=SHADE, edgecolor=HATCH, hatch="//", linewidth=0, zorder=0, label=text)
    x, y = smooth(np.log([horizon for horizon, _ in curve]), np.array([trial.mean(1) for _, trial in curve]))
    axes.plot(np.exp(x), y, color=FAINT, linewidth=1.4, zorder=1)


def _draw_points(axes: Axes, points: Sequence[tuple[float, Trial]]) -> None:
    names = [trial.name.removeprefix(AVERAGE) for _, trial in points if not trial.is_constant]
    label: str | None = "made constant decays"
    for horizon, trial in points:
        if trial.is_constant:
            style: dict[str, Any] = {"color": FAINT, "marker": "o", "markersize": 4, "label": label}
            label = None
        else:
            text = wrap_text(f"{shown(trial.name)}: {format_value(trial.mean(1))}", MAX_LABEL)
            own = line_style(trial.name.removeprefix(AVERAGE), names)
            style = own | {"markersize": 8, "label": text}
        axes.plot([horizon], [trial.mean(1)], **style | {"zorder": 2, "linestyle": ""})
    texts = [f"{shown(trial.name)}: {format_value(trial.mean(1))}" for _, trial in points]
    add_tips(axes, [horizon for horizon, _ in points], [trial.mean(1) for _, trial in points], texts)


def smooth(x: Array, y: Array) -> tuple[Array, Array]:
    """Return points on a curve through the given ones that rises and falls only where they do.

    A cubic between two points with the slopes of Fritsch and Butland (1984): 0 at an extreme, else the harmonic mean.
    Both arrays are `[n]`, and `x` rises.
    """
    slopes = np.diff(y) / np.diff(x)
    inner = np.zeros(max(0, len(x) - 2))
    same = slopes[:-1] * slopes[1:] > 0
    inner[same] = 2 * slopes[:-1][same] * slopes[1:][same] / (slopes[:-1][same] + slopes[1:][same])
    at = np.concatenate([slopes[:1], inner, slopes[-1:]])
    share = np.linspace(0, 1, POINTS_BETWEEN, endpoint=False)
    found_x, found_y = [], []
    for k in range(len(x) - 1):
        width = x[k + 1] - x[k]
        bend = at[k] * width * share * (1 - share) ** 2 - at[k + 1] * width * share**2 * (1 - share)
        found_x.append(x[k] + width * share)
        found_y.append(y[k] + (y[k + 1] - y[k]) * (3 - 2 * share) * share**2 + bend)
    return np.concatenate([*found_x, x[-1:]]), np.concatenate([*found_y, y[-1:]])
