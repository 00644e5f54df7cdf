"""The look of every picture: lines told apart without colour, legends outside the axes, no display needed.

Every line differs in colour (Okabe and Ito's palette, distinct for the colour-blind), in marker and in dashes, so that
a print in black and white tells them apart.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.files import write_atomically
from trainer.report.read import LIVE

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


def finish(figure: Figure, panels: Sequence[Axes], *, columns: int = 3, steps: bool = True) -> None:
    """Grid, a legend below that fits the width, and round numbers of steps on the lowest axis."""
    for axes in panels:
        axes.grid(True, color="#DDDDDD", linewidth=0.8)
    if steps:
        panels[-1].set_xlabel(STEPS)
        panels[-1].xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=ROUND_STEPS))
    handles, labels = panels[0].get_legend_handles_labels()
    if not handles:
        return
    for count in range(min(columns, len(handles)), 0, -1):
        legend = figure.legend(
            handles, labels, loc="outside lower center", ncols=count, frameon=False, fontsize="small"
        )
        wide = legend.get_window_extent(figure.canvas.get_renderer()).width  # type: ignore[attr-defined]
        if count == 1 or wide <= 0.98 * figure.bbox.width:
            return
        legend.remove()


def save(path: Path, draw: Callable[[Figure], None], *, height: float) -> None:
    """Draw a figure and write it as PNG, atomically."""
    content = io.BytesIO()
    with rc_context(RC):
        figure = Figure(figsize=(WIDTH_IN, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.savefig(content, format="png", metadata={"Software": None})
    write_atomically(path, content.getvalue())
