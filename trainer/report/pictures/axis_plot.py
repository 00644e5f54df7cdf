"""Figure of the best decay over the course of a run with `ema.axis`."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from trainer.report.best_decay import decay_text
from trainer.report.format import format_value
from trainer.report.group import Group
from trainer.report.pictures.style import COLOURS, FAINT, INK, MAX_MARKERS, STEPS, finish_figure, save
from trainer.report.pictures.svg import add_tips
from trainer.report.runs import Run
from trainer.rundir.keys import axis_key

MAX_TICKS = 12
"""Most horizons with a label."""


def draw_best_decay(run: Run, path: Path) -> str | None:
    """Draw the horizon of the best decay over steps, with the tracked horizons as lines.

    Triangles mark evaluations at which the best one is the longest of the bank.

    Returns:
        The picture as SVG; None if the run did not record the best decay.
    """
    best = run.series(axis_key("horizon")).finite()
    tested = sorted(round(horizon, 6) for horizon in Group(run.name, [run]).horizons.values())
    if not len(best.steps) or not tested:
        return None
    values = dict(run.series(axis_key(run.primary_metric)).pairs())

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_yscale("log", base=2)
        marker = "o" if len(best.steps) <= MAX_MARKERS else ""
        axes.plot(*best, color=COLOURS[0], linewidth=2, marker=marker, label="best decay", zorder=3)
        at_end = np.isclose(best.values, tested[-1])
        if at_end.any():
            x, y = best.steps[at_end], best.values[at_end]
            axes.plot(x, y, "^", markersize=8, color=INK, zorder=4, label="longest average is best")
        texts = [
            f"step {step}: horizon {horizon:.4g}, decay {decay_text(horizon)}, {run.primary_metric}"
            f" {format_value(values.get(step))}"
            for step, horizon in best.pairs()
        ]
        add_tips(axes, *best, texts)
        axes.set_ylim(min(*best.values, tested[0]) / 1.4, max(*best.values, tested[-1]) * 1.4)
        axes.set_xlabel(STEPS)
        axes.set_ylabel("horizon 1 / (1 - decay)\n(optimizer steps)", fontsize="small")
        shown = tested[-MAX_TICKS:]
        axes.set_yticks(shown, [f"{horizon:g}" for horizon in shown])
        axes.yaxis.set_minor_locator(NullLocator())
        finish_figure(figure, [[axes]])
        axes.grid(False)
        for horizon in tested:
            axes.axhline(horizon, color=FAINT, linewidth=0.8, linestyle=":", zorder=1)

    return save(path, draw, height=3.4)
