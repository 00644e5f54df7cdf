"""The look of every picture: lines told apart without colour, legends outside the axes, no display needed.

Every line differs in colour (Okabe and Ito's palette, distinct for the colour-blind), in marker and in dashes, so that
a print in black and white tells them apart.
"""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from trainer.report.runs import LIVE
from trainer.rundir.files import write_atomically

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#5D5D5D"]
MARKERS = ["s", "^", "D", "v", "P", "X", "<", ">", "p", "h"]
DASHES: list[Any] = ["-", "--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)), (0, (8, 3))]
RC: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
DPI = 150
WIDTH_IN = 6.4
CHARACTER_IN = 0.098
"""Width of a digit of a tick's label; words are narrower."""
SMALL_CHARACTER_IN, SMALL_DIGIT_IN = 0.073, 0.082
"""Of the small print of legends: a letter of a word, and a digit."""
MAX_LEGEND_LINE = int((WIDTH_IN - 0.75) / SMALL_DIGIT_IN)
"""Characters of a line of a legend that fit beside its sample."""
LINE_IN, SMALL_LINE_IN = 0.19, 0.2
"""Height of a line of a label, and of a legend."""
STEPS = "optimizer step"
ROUND_STEPS = [1, 2, 2.5, 5, 10]
"""Ticks at 100, 200 or 250, not at 80 and 160."""
MAX_MARKERS = 12


def line_style(name: str, averages: Sequence[str]) -> dict[str, Any]:
    """The same look of an average in every picture of a run; the live weights are thick, black and round."""
    if name == LIVE:
        look = {"color": "black", "marker": "o", "linestyle": "-", "linewidth": 2.2, "zorder": 3}
        return look | {"markersize": 5}
    place = averages.index(name)
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": DASHES[place % len(DASHES)],
        "linewidth": 1.6,
        "markersize": 5,
    }


def finish_figure(
    figure: Figure,
    rows: Sequence[Sequence[Axes]],
    *,
    columns: int = 3,
    steps: bool = True,
    legend: bool = True,
    right_in: float = 0.15,
) -> None:
    """Grid, round numbers, a legend below that fits the width, and room for all labels.

    The figure grows by the legend's height: that of many averages would leave its panels no room. The room is reckoned
    from the number of characters: matplotlib's own layout draws all texts several times to measure them, which takes as
    long as everything else.

    Args:
        figure: Whose.
        rows: Its panels from the top down. The legend is that of the first one.
        columns: Of the legend, at most.
        steps: Whether the axes below are of optimizer steps.
        legend: Whether there is one.
        right_in: Inches that are kept free at the right.
    """
    # First of all: how many ticks an axis gets may depend on its length.
    lines = _legend(figure, rows[0][0], columns) if legend else 0
    below_axes = SMALL_LINE_IN * lines + 0.1 * bool(lines)
    wide, high = figure.get_size_inches()
    high += below_axes
    figure.set_size_inches(wide, high)
    for axes in (axes for row in rows for axes in row):
        axes.grid(True, color="#DDDDDD", linewidth=0.8)
        if isinstance(axes.yaxis.get_major_locator(), MaxNLocator):
            axes.yaxis.set_major_locator(MaxNLocator(nbins=6 if len(rows[0]) == 1 else 4, steps=ROUND_STEPS))
        if steps:
            axes.xaxis.set_major_locator(
                MaxNLocator(nbins=7 // len(rows[0]), integer=True, steps=ROUND_STEPS)
            )
    if steps:
        for axes in rows[-1]:
            axes.set_xlabel(STEPS)
    left, between = (
        max((y_label_width_in(row[n]) for row in rows if n < len(row)), default=0) for n in (0, 1)
    )
    title = max(_lines(axes.get_title()) for axes in rows[0]) * SMALL_LINE_IN
    across = title + 0.4 if title else 0.12
    below = max(_lines(axes.get_xlabel()) + _tick_lines(axes) for axes in rows[-1])
    bottom = 0.18 + LINE_IN * below + below_axes
    figure.subplots_adjust(
        left=left / wide,
        right=1 - right_in / wide,
        top=1 - (0.12 + title) / high,
        bottom=bottom / high,
        # Both in units of a panel's own size.
        wspace=between * len(rows[0]) / (wide - left - right_in - between),
        hspace=across * len(rows) / (high - 0.12 - title - bottom - across * (len(rows) - 1)),
    )


def _legend(figure: Figure, axes: Axes, columns: int) -> int:
    """Put it below, in as many columns as fit; returns its height in lines."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return 0
    labels = ["\n".join(wrap_text(line, MAX_LEGEND_LINE) for line in text.split("\n")) for text in labels]
    widest = 0.65 + max(_small_width(line) for text in labels for line in text.split("\n"))
    count = max(1, min(columns, len(handles), int((WIDTH_IN - 0.1) / widest)))
    figure.legend(handles, labels, loc="lower center", ncols=count, frameon=False, fontsize="small")
    deep = math.ceil(len(labels) / count)
    return sum(max(map(_lines, labels[place::deep])) for place in range(deep))


def _small_width(line: str) -> float:
    return sum(SMALL_DIGIT_IN if character.isdecimal() else SMALL_CHARACTER_IN for character in line)


def _lines(text: str) -> int:
    return text.count("\n") + 1 if text else 0


def _tick_lines(axes: Axes) -> int:
    return max(map(_lines, _ticks(axes.xaxis)), default=1)


def y_label_width_in(axes: Axes) -> float:
    """Inches that the label of the axis over y and those of its ticks need."""
    reach = max((len(line) for text in _ticks(axes.yaxis) for line in text.split("\n")), default=0)
    return 0.22 + CHARACTER_IN * reach + LINE_IN * _lines(axes.get_ylabel())


def _ticks(axis: Any) -> list[str]:
    """The labels that an axis will have."""
    low, high = sorted(axis.get_view_interval())
    found = []
    for locations, formatter in (
        (axis.get_majorticklocs(), axis.get_major_formatter()),
        (axis.get_minorticklocs(), axis.get_minor_formatter()),
    ):
        texts = formatter.format_ticks(locations) if len(locations) else []
        found += [text for text, place in zip(texts, locations, strict=False) if low <= place <= high]
    return found


def wrap_text(text: str, width: int) -> str:
    """`text` in lines of at most `width` characters, broken at blanks where there are any; nothing is left out."""
    return "\n".join(wrap(text, width, break_on_hyphens=False))


def save(path: Path, draw: Callable[[Figure], None], *, height: float) -> None:
    """Draw a figure and write it as PNG, atomically."""
    content = io.BytesIO()
    with rc_context(RC):
        figure = Figure(figsize=(WIDTH_IN, height), dpi=DPI)
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        canvas.draw()
    width, rows = canvas.get_width_height()
    picture = Image.frombuffer("RGBA", (width, rows), canvas.buffer_rgba(), "raw", "RGBA", 0, 1).convert(
        "RGB"
    )
    # Without a channel for transparency, and at a level that takes half the time for a tenth more bytes.
    picture.save(content, "PNG", compress_level=3)
    write_atomically(path, content.getvalue())
