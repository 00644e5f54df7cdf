"""Figure over the setting in which the groups of a comparison differ, such as the learning rate."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from trainer.report.comparison import Comparison
from trainer.report.format import direction_text, display_name
from trainer.report.pictures.style import CHARACTER_IN, FAINT, finish_figure, label_log_axis, line_style, save
from trainer.report.verdicts import Row
from trainer.rundir.keys import LIVE

WIDE = 8
"""Ratio of the largest to the smallest positive value from which the axis is logarithmic."""
AXIS_IN = 5.0
"""Least width of the axis of the setting, in inches."""


def draw_over_setting(comparison: Comparison, path: Path, averages: Sequence[str]) -> str | None:
    """Draw the live weights and the best average of each group over the one setting that differs.

    Error bars are the standard deviation over seeds. The marker and the colour of a point are those of its average.

    Args:
        comparison: Comparison to draw.
        path: PNG file.
        averages: All averages of the page, which share the colours.

    Returns:
        The picture as SVG; None unless exactly one setting differs, all its values are numbers, and two groups have a
        finite value.
    """
    key = _setting(comparison)
    if key is None or comparison.higher_is_better is None:
        return None
    live, best = _points(comparison, key)
    values = sorted({value for value, _ in (*live, *best)})
    if len(values) < 2:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _scale(axes, key, values)
        if live:
            axes.errorbar(*_columns(live), capsize=3, label=LIVE, **line_style(LIVE, averages))
        axes.plot(
            [value for value, _ in best], [row.last.value for _, row in best], color=FAINT, linewidth=1.2
        )
        for name in averages:
            own = [point for point in best if point[1].weights == name]
            if own:
                style = line_style(name, averages) | {"linestyle": "", "markersize": 8}
                text = f"best average: {display_name(name)}"
                axes.errorbar(*_columns(own), capsize=4, label=text, **style)
        axes.set_xlabel(f"{key}\nmean ± SD over seeds")
        metric = comparison.groups[0].with_unit(comparison.metric)
        axes.set_ylabel(f"last evaluation {metric}\n{direction_text(comparison.higher_is_better)}")
        finish_figure(figure, [[axes]], columns=2, steps=False)

    return save(path, draw, height=4.2)


def _setting(comparison: Comparison) -> str | None:
    """Return the only setting that differs, if every group has a finite number for it."""
    keys = comparison.settings()
    if len(keys) != 1:
        return None
    try:
        values = [float(group.runs[0].settings[keys[0]]) for group in comparison.groups]
    except (KeyError, ValueError):
        return None
    return keys[0] if all(map(math.isfinite, values)) else None


def _points(comparison: Comparison, key: str) -> tuple[list[tuple[float, Row]], list[tuple[float, Row]]]:
    """Return (value of the setting, row) of the live weights, and of the best average of each group."""
    live, best = [], []
    better = max if comparison.higher_is_better else min
    for group, rows in zip(comparison.groups, comparison.rows, strict=True):
        value = float(group.runs[0].settings[key])
        eligible = [row for row in rows if row.is_eligible]
        live += [(value, row) for row in eligible if row.weights == LIVE]
        averages = [row for row in eligible if row.weights != LIVE]
        if averages:
            best.append((value, better(averages, key=lambda row: row.last.value)))
    return sorted(live, key=lambda point: point[0]), sorted(best, key=lambda point: point[0])


def _columns(points: Sequence[tuple[float, Row]]) -> tuple[list[float], list[float], list[float]]:
    """Return values of the setting, means, and standard deviations over seeds."""
    return (
        [value for value, _ in points],
        [row.last.value for _, row in points],
        [row.last.sd or 0.0 for _, row in points],
    )


def _scale(axes: Axes, key: str, values: Sequence[float]) -> None:
    """Choose a logarithmic axis for learning rates and wide ranges of positive values; label the tested values."""
    is_rate = key.split(".")[-1] == "lr"
    is_log = values[0] > 0 and (is_rate or values[-1] / values[0] > WIDE)
    if is_log:
        axes.set_xscale("log")
    axes.margins(x=0.1)
    at = [math.log(value) for value in values] if is_log else values
    nearest = min(after - before for before, after in pairwise(at)) / (at[-1] - at[0]) * AXIS_IN
    texts = [f"{value:g}" for value in values]
    if nearest > CHARACTER_IN * max(map(len, texts)) / 1.2:
        axes.set_xticks(list(values), texts)
        axes.xaxis.set_minor_locator(NullLocator())
    elif is_log:
        label_log_axis(axes.xaxis, values[-1] / values[0])
