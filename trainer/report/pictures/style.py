"""Common style of all figures: line styles, legends below the axes, and margins that fit all labels.

Averages differ in colour (the palette of Okabe and Ito, distinct for colour-blind readers), in marker and in dashes, so
that they are also distinct in black and white. A colour belongs to an average: groups of runs differ in greys, in
markers and in dashes. No display is needed.
"""

import io
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray
from PIL import Image

from trainer.report.pictures.svg import to_svg
from trainer.rundir.files import write_atomically
from trainer.rundir.keys import LIVE

INK, FAINT, GRID, PAPER = "#1a1a1a", "#5d5d5d", "#dddddd", "#ffffff"
"""Colours of live weights and texts, of what is less important, of the grid, and of the background."""
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7b4fb5", "#8c6d3f"]
"""Colours of averages."""
GREYS = [INK, "#6b6b6b", "#9a9a9a"]
"""Colours of groups of runs."""
SHADE, HATCH = "#eeeeee", "#aaaaaa"
"""Colours of an interval that is shaded."""
VARIABLES = {
    **{colour: f"average-{slot}" for slot, colour in enumerate(COLOURS)},
    **{colour: f"group-{index}" for index, colour in enumerate(GREYS) if index},
    **{INK: "ink", FAINT: "faint", GRID: "grid", PAPER: "paper", SHADE: "shade", HATCH: "hatch"},
}
"""Variables of `page.html` by colour; a page sets them for light and for dark screens."""
MARKERS = ["s", "^", "D", "v", "P", "X", "<", ">", "p", "h"]
DASHES: list[Any] = ["-", "--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)), (0, (8, 3))]
RC: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    # Texts stay texts, in the fonts of the page, and the ids follow from the content.
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    # Names of runs and settings may contain "$", which begins a formula otherwise. So axes need plain tick labels.
    "text.parse_math": False,
}
DPI = 150
WIDTH_IN = 6.4
CHARACTER_IN = 0.098
"""Width of a digit in a tick label, in inches; letters are narrower."""
SMALL_CHARACTER_IN, SMALL_DIGIT_IN = 0.073, 0.082
"""Width of a letter and of a digit in a legend, in inches."""
MAX_LEGEND_LINE = int((WIDTH_IN - 0.75) / SMALL_DIGIT_IN)
"""Most characters in a line of a legend, beside the sample of the line style."""
LINE_IN, SMALL_LINE_IN = 0.19, 0.2
"""Height of a line of an axis label and of a legend, in inches."""
TOP_IN = 0.12
"""Free space above the top panel or its title, in inches."""
STEPS = "optimizer step"
ROUND_STEPS = [1, 2, 2.5, 5, 10]
"""Allowed tick distances: ticks at 100, 200 or 250, not at 80 and 160."""
MAX_MARKERS = 12
"""Most markers on one line."""
MAX_POINTS, MAX_BAND_POINTS = 250, 60
"""Most points of a line and of a band around it, to keep the SVG small."""


def line_style(name: str, averages: Iterable[str]) -> dict[str, Any]:
    """Return the line style of some weights; live is black and thick.

    Args:
        name: Name of an average, or of the live weights.
        averages: All averages of the page, in any order: the same averages give the same styles.
    """
    if name == LIVE:
        style = {"color": INK, "marker": "o", "linestyle": "-", "linewidth": 2.2, "zorder": 3}
        return style | {"markersize": 5}
    return _style(COLOURS, _slots(frozenset(averages))[name]) | {"linewidth": 1.6, "markersize": 5}


def _style(colours: Sequence[str], place: int) -> dict[str, Any]:
    return {
        "color": colours[place % len(colours)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": DASHES[place % len(DASHES)],
    }


@lru_cache(maxsize=64)
def _slots(averages: frozenset[str]) -> dict[str, int]:
    """Return the place of each average in COLOURS and beyond: the one that follows from its name, or the next free."""
    slots: dict[str, int] = {}
    for name in sorted(averages):
        first, used = _preferred_slot(name), set(slots.values())
        turns = (
            len(COLOURS) * turn + (first + step) % len(COLOURS)
            for turn in count()
            for step in range(len(COLOURS))
        )
        slots[name] = next(slot for slot in turns if slot not in used)
    return slots


def _preferred_slot(name: str) -> int:
    """Return two places for each factor of 10 of the horizon if the name is a decay, else a place by its letters."""
    try:
        decay = float(name)
    except ValueError:
        decay = 0.0
    if not 0 < decay < 1:
        return zlib.crc32(name.encode()) % len(COLOURS)
    return round(2 * math.log10(1 / (1 - decay)) - 2) % len(COLOURS)


def group_style(index: int) -> dict[str, Any]:
    """Return the line style of a group of runs by its index among the drawn groups."""
    return _style(GREYS, index) | {"linewidth": 1.4, "markersize": 7}


def plot_line(axes: Axes, x: NDArray[Any], values: NDArray[np.float64], **style: Any) -> None:
    """Draw a line with a few markers; of many points, the least and the largest of each stretch."""
    kept = np.arange(len(values))
    if len(values) > MAX_POINTS:
        stretches = np.array_split(kept, MAX_POINTS // 2 - 1)
        ends = [part[choose(values[part])] for part in stretches for choose in (np.argmin, np.argmax)]
        kept = np.unique([0, *ends, len(values) - 1])
    every = max(1, math.ceil(len(kept) / MAX_MARKERS))
    axes.plot(x[kept], values[kept], markevery=every, **style)


def fill_band(
    axes: Axes, x: NDArray[Any], middle: NDArray[np.float64], half: NDArray[np.float64], colour: str
) -> None:
    """Fill a band around a line; of many points, evenly spaced ones."""
    kept = np.unique(np.linspace(0, max(0, len(x) - 1), MAX_BAND_POINTS).round().astype(np.intp))[: len(x)]
    low, high = (middle - half)[kept], (middle + half)[kept]
    axes.fill_between(x[kept], low, high, color=colour, alpha=0.15, linewidth=0)


def finish_figure(
    figure: Figure,
    rows: Sequence[Sequence[Axes]],
    *,
    columns: int = 3,
    steps: bool = True,
    legend: bool = True,
    right_in: float = 0.15,
) -> None:
    """Add grid, round ticks and a legend below the panels, and set margins that fit all labels.

    The figure grows by the height of the legend, so that the panels keep their size with many averages. The margins are
    estimated from numbers of characters: matplotlib's constrained layout measures texts by drawing them, which makes a
    report 15 to 20 % slower.

    Args:
        figure: Figure to finish.
        rows: Panels of the figure, row by row from the top. The legend shows the lines of the first panel.
        columns: Most columns of the legend.
        steps: Whether the x axes show optimizer steps.
        legend: Whether the figure has a legend.
        right_in: Free space at the right, in inches.
    """
    lines = _add_legend(figure, rows[0][0], columns) if legend else 0
    legend_in = SMALL_LINE_IN * lines + 0.1 * bool(lines)
    width, height = figure.get_size_inches()
    # The size comes first because the number of ticks may depend on it.
    figure.set_size_inches(width, height + legend_in)
    _set_ticks(rows, steps=steps)
    _set_margins(figure, rows, legend_in, right_in)


def _set_ticks(rows: Sequence[Sequence[Axes]], *, steps: bool) -> None:
    for axes in (axes for row in rows for axes in row):
        axes.grid(True, color=GRID, linewidth=0.8)
        if isinstance(axes.yaxis.get_major_locator(), MaxNLocator):
            axes.yaxis.set_major_locator(MaxNLocator(nbins=6 if len(rows[0]) == 1 else 4, steps=ROUND_STEPS))
        if steps:
            axes.xaxis.set_major_locator(
                MaxNLocator(nbins=7 // len(rows[0]), integer=True, steps=ROUND_STEPS)
            )
    if steps:
        for axes in rows[-1]:
            axes.set_xlabel(STEPS)


def _set_margins(figure: Figure, rows: Sequence[Sequence[Axes]], legend_in: float, right_in: float) -> None:
    """Set the margins and the spaces between panels, all estimated in inches.

    A figure has one or two columns of panels.
    """
    width, height = figure.get_size_inches()
    left, between_columns = (
        max((y_label_width_in(row[n]) for row in rows if n < len(row)), default=0) for n in (0, 1)
    )
    title = max(_lines(axes.get_title()) for axes in rows[0]) * SMALL_LINE_IN
    top = TOP_IN + title
    between_rows = title + 0.4 if title else 0.12
    label_lines = max(_lines(axes.get_xlabel()) + _tick_lines(axes) for axes in rows[-1])
    bottom = 0.18 + LINE_IN * label_lines + legend_in
    figure.subplots_adjust(
        left=left / width,
        right=1 - right_in / width,
        top=1 - top / height,
        bottom=bottom / height,
        # matplotlib measures both in units of the size of a panel.
        wspace=between_columns * len(rows[0]) / (width - left - right_in - between_columns),
        hspace=between_rows * len(rows) / (height - top - bottom - between_rows * (len(rows) - 1)),
    )


def _add_legend(figure: Figure, axes: Axes, columns: int) -> int:
    """Add a legend below the panels, in as many columns as fit; return its height in lines."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return 0
    labels = ["\n".join(wrap_text(line, MAX_LEGEND_LINE) for line in text.split("\n")) for text in labels]
    widest = 0.65 + max(_small_width(line) for text in labels for line in text.split("\n"))
    count = max(1, min(columns, len(handles), int((WIDTH_IN - 0.1) / widest)))
    figure.legend(handles, labels, loc="lower center", ncols=count, frameon=False, fontsize="small")
    rows = math.ceil(len(labels) / count)
    return sum(max(map(_lines, labels[row::rows])) for row in range(rows))


def _small_width(line: str) -> float:
    return sum(SMALL_DIGIT_IN if character.isdecimal() else SMALL_CHARACTER_IN for character in line)


def _lines(text: str) -> int:
    return text.count("\n") + 1 if text else 0


def _tick_lines(axes: Axes) -> int:
    return max(map(_lines, _tick_labels(axes.xaxis)), default=1)


def y_label_width_in(axes: Axes) -> float:
    """Estimate the width of the label and of the tick labels of the y axis, in inches."""
    longest = max((len(line) for text in _tick_labels(axes.yaxis) for line in text.split("\n")), default=0)
    return 0.22 + CHARACTER_IN * longest + LINE_IN * _lines(axes.get_ylabel())


def label_log_axis(axis: Axis, ratio: float) -> None:
    """Label a logarithmic axis with plain numbers, also between powers of ten if largest / smallest is small."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.set_minor_formatter("{x:g}" if ratio < 300 else NullFormatter())


def _tick_labels(axis: Any) -> list[str]:
    """Return the tick labels that will be visible."""
    low, high = sorted(axis.get_view_interval())
    labels = []
    for locations, formatter in (
        (axis.get_majorticklocs(), axis.get_major_formatter()),
        (axis.get_minorticklocs(), axis.get_minor_formatter()),
    ):
        texts = formatter.format_ticks(locations) if len(locations) else []
        labels += [text for text, at in zip(texts, locations, strict=False) if low <= at <= high]
    return labels


def wrap_text(text: str, width: int) -> str:
    """Break `text` into lines of at most `width` characters, at blanks where possible; keep all characters."""
    return "\n".join(wrap(text, width, break_on_hyphens=False))


def save(path: Path, draw: Callable[[Figure], None], *, height: float) -> str:
    """Draw a figure, write it atomically as PNG, and return it as SVG (see `to_svg`).

    Args:
        path: PNG file.
        draw: Draws on an empty figure.
        height: Height in inches, without the legend.
    """
    content = io.BytesIO()
    with rc_context(RC):
        figure = Figure(figsize=(WIDTH_IN, height), dpi=DPI)
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        canvas.draw()
        width, rows = canvas.get_width_height()
        picture = Image.frombuffer("RGBA", (width, rows), canvas.buffer_rgba(), "raw", "RGBA", 0, 1)
        svg = to_svg(figure, path.stem, VARIABLES)
    # RGB needs no transparency channel; this compression level takes half the time for 10 % more bytes.
    picture.convert("RGB").save(content, "PNG", compress_level=3)
    write_atomically(path, content.getvalue())
    return svg
