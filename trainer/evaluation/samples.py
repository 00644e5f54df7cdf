"""Images that the live weights and averages of a run draw from the same noise, at its end and at its evaluations."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ema import ExponentialMovingAverage
from trainer.distributed.processes import on_main
from trainer.distributed.sharding import Network
from trainer.evaluation.custom import is_higher_better
from trainer.evaluation.evaluation import Evaluation, evaluating
from trainer.loop.fit import Run
from trainer.protocols import DrawsGuided, DrawsImages, Logger, SampleRandom, Task
from trainer.report.format import display_name
from trainer.rundir.keys import LIVE, evaluation_key
from trainer.rundir.pairs import Pairs

SAMPLES = "samples"
"""Name of the final grid, and of the folder with those of the evaluations."""

Drawn = Mapping[str, Mapping[str, NDArray[np.float32]]]
"""Images `[n, c, h, w]` in [0, 1], by the ending of the titles of their panels (such as `, w = 2`) and by weights."""


def write_images(path: Path, rows: Drawn) -> bool:
    """Write all images as one PNG, with a row of panels for each scale; return False if they are no pictures.

    Raises:
        OSError: The file cannot be written.
    """
    by_weights = next(iter(rows.values()))
    if by_weights[LIVE].shape[1] not in (1, 3):  # latents are no colours
        return False
    from trainer.report.pictures.grid import write_grid  # imports Pillow, which most runs do not need

    panels = {
        display_name(name) + ending: images for ending, row in rows.items() for name, images in row.items()
    }
    write_grid(path, panels, len(by_weights) if len(rows) > 1 else None)
    return True


def draw_samples(
    run: Run,
    evaluation: Evaluation,
    random: Callable[[], SampleRandom] | None,
    names: Collection[str] | None = None,
) -> Drawn | None:
    """Draw images with the live weights and with averages from the same noise; None for a task without images.

    Args:
        run: run with the weights.
        evaluation: evaluation of the run, which gives each average its BatchNorm statistics.
        random: function that returns the same random numbers at each call; None draws no images.
        names: names of the averages that draw; None means all that have started.

    Collectives: those of the model's forwards.
    """
    ways = _ways_to_draw(run.task)
    if random is None or not ways:
        return None
    rows: dict[str, dict[str, NDArray[np.float32]]] = {ending: {} for ending in ways}

    def draw(name: str) -> None:
        with evaluating(run.network), run.network.autocast():
            for ending, images in ways.items():
                rows[ending][name] = images(run.network.module, random()).float().cpu().numpy()

    draw(LIVE)
    for name, average in run.bank.items():
        if average.started and (names is None or name in names):
            with average.swapped_into(run.network.module):
                evaluation.reestimate(run.network)
                draw(name)
    return rows


def _ways_to_draw(task: Task) -> dict[str, Callable[[nn.Module, SampleRandom], Tensor]]:
    """Return functions that draw images, by the ending of their panels' titles; empty for a task without images."""
    if isinstance(task, DrawsGuided):
        several = len(task.guidance_scales) > 1
        return {
            f", w = {scale:g}" if several else "": partial(task.images, guidance=scale)
            for scale in task.guidance_scales
        }
    return {"": task.images} if isinstance(task, DrawsImages) else {}


def best_average(record: Mapping[str, float], names: Collection[str], evaluation: Evaluation) -> str | None:
    """Return the average with the best finite value of the primary metric in a record; None if none is the best."""
    metric = evaluation.task.primary_metric
    higher = is_higher_better(metric, evaluation.task, evaluation.metrics)
    if higher is None:
        return None
    sign = -1.0 if higher else 1.0
    values = {name: record.get(evaluation_key(name, metric), math.nan) for name in names}
    costs = {name: sign * value for name, value in values.items() if math.isfinite(value)}
    return min(costs, key=costs.__getitem__, default=None)


@dataclass(frozen=True)
class EvaluationWithGrid:
    """Evaluation that also writes a grid of images of the live weights and of the best average."""

    run: Run
    evaluation: Evaluation
    keep: Callable[[Pairs], object] | None
    """Function that keeps what paired comparisons need; None on the other ranks."""
    random: Callable[[], SampleRandom] | None
    folder: Path | None
    """Folder of the PNG files; None on ranks that only help to draw."""
    logger: Logger
    note: Callable[[str], object]
    """Function that shows a warning."""

    def __call__(
        self, network: Network, averages: Mapping[str, ExponentialMovingAverage]
    ) -> dict[str, float]:
        """Evaluate, and draw at the step of the run; a picture that cannot be written is a warning.

        Collectives: those of the evaluation and of the forwards that draw, and one object broadcast.
        """
        run = self.run
        record = self.evaluation(network, averages, step=run.step, full=run.finished, keep=self.keep)
        # The ranks may differ in the last bit of a mean, and must draw with the same average.
        best = on_main(lambda: best_average(record, averages, self.evaluation), "choosing an average to draw")
        drawn = draw_samples(self.run, self.evaluation, self.random, [best] if best else [])
        if drawn is not None and self.folder is not None:
            path = self.folder / f"step-{self.run.step:08d}.png"
            try:
                if write_images(path, drawn):
                    self.logger.image(self.run.step, SAMPLES, str(path))
            except OSError as error:
                self.note(f"warning: {path}: cannot be written: {error.strerror or error}")
        return record
