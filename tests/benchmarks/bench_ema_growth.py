"""How the time of an update grows with the number of parameters and with the number of tensors."""

import gc
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.benchmarks.bench_ema_figures import Figure, Target, milliseconds
from tests.benchmarks.bench_ema_models import Tree, count, flat_lerp
from tests.benchmarks.bench_ema_speed import FLAT, OURS
from tests.benchmarks.ema_peers import ours
from tests.benchmarks.rounds import Spread, interleave

TENSORS = 100
ELEMENTS = 1000
PARAMETERS_AXIS = [TENSORS * size for size in (1000, 3162, 10_000, 31_623, 100_000, 316_228, 1_000_000)]
TENSORS_AXIS = [10, 32, 100, 316, 1000, 3162, 10_000]
LINEAR = 1.1
"""Largest slope of log time against log size that counts as linear. Where the caches come to their end the flat
`lerp_` itself is steeper; then its slope is what counts."""

Curve = dict[str, list[Spread]]


def slope(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Least-squares slope of log time against log size, over the upper half of the sizes."""
    first = len(sizes) // 2
    x, y = ([math.log(value) for value in values[first:]] for values in (sizes, times))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def grow(shapes: Sequence[tuple[int, int]], rounds: int) -> Curve:
    """Milliseconds of ours and of a flat lerp_ for models of so many tensors of so many elements."""
    curve: Curve = {OURS: [], FLAT: []}
    for tensors, elements in shapes:
        model = Tree(tensors, elements)
        times = interleave({OURS: ours(model).update, FLAT: flat_lerp(count(model))}, rounds)
        for name, own in times.items():
            curve[name].append(milliseconds(own))
        del model
        gc.collect()
    return curve


def draw(path: Path, panels: Sequence[tuple[str, Sequence[int], Curve]]) -> None:
    """One panel a curve, logarithmic; bands are quartiles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(picture)
    for position, (label, sizes, curve) in enumerate(panels):
        axes = picture.add_subplot(1, len(panels), position + 1)
        for name, style in ((OURS, "o-"), (FLAT, "s--")):
            own = curve[name]
            medians = [spread.median for spread in own]
            text = f"{name}: {slope(sizes, medians):.2f}"
            (line,) = axes.plot(sizes, medians, style, label=text, markersize=4)
            low, high = [spread.low for spread in own], [spread.high for spread in own]
            axes.fill_between(sizes, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="ms per update")
        axes.grid(which="major", alpha=0.3)
        last = curve[FLAT][-1].median
        axes.plot(
            sizes,
            [last * size / sizes[-1] for size in sizes],
            ":",
            color="grey",
            label="slope 1",
            linewidth=1,
        )
        axes.legend(title="slope over the upper half", loc="upper left")
    picture.savefig(path, dpi=120)


def growth(
    threads: int,
    rounds: int,
    plot: Path | None = None,
    parameters: Sequence[int] = PARAMETERS_AXIS,
    tensors: Sequence[int] = TENSORS_AXIS,
) -> list[Figure]:
    """Time against number of parameters, in 100 tensors, and against number of tensors, of 1,000 elements each."""
    torch.set_num_threads(threads)
    rounds = max(2, rounds // 2)
    panels = [
        (
            f"parameters, in {TENSORS} tensors",
            parameters,
            grow([(TENSORS, size // TENSORS) for size in parameters], rounds),
        ),
        (
            f"tensors, of {ELEMENTS:,} elements",
            tensors,
            grow([(number, ELEMENTS) for number in tensors], rounds),
        ),
    ]
    if plot is not None:
        draw(plot, panels)
    lines = []
    for label, sizes, curve in panels:
        for position, size in enumerate(sizes):
            ours_over = curve[OURS][position].median / curve[FLAT][position].median
            lines.append(Figure(label, f"{size:,}", ours_over, "x flat lerp_", ms=curve[OURS][position]))
        own, flat = (slope(sizes, [spread.median for spread in curve[name]]) for name in (OURS, FLAT))
        lines += [
            Figure(label, "slope over the upper half", own, target=Target(round(max(LINEAR, flat), 3))),
            Figure(label, "slope over the upper half, one flat lerp_", flat),
        ]
    return lines
