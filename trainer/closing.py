"""The end of a run: pictures that the task draws, the report, the table, and what to type next."""

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.compose import without_clearing
from trainer.evaluation import LIVE, evaluating
from trainer.loop import Run
from trainer.protocols import DrawsImages, Logger, SampleRandom
from trainer.report import read_run, write_report
from trainer.report.brief import brief
from trainer.report.grid import write_grid
from trainer.report.rows import best_of, rows_of
from trainer.report.table import print_tables, table_of
from trainer.rundir import RunDir

SAMPLES = "samples.png"


def draw_samples(run: Run, random: Callable[[], SampleRandom] | None) -> dict[str, NDArray[np.float32]]:
    """Images made by the live weights and by every average from the same noise, `[n, c, h, w]` in [0, 1] by name.

    Args:
        run: trained.
        random: makes the random numbers from their beginning each time it is called; None draws nothing.

    Collectives: those of the model's forwards.
    """
    task = run.task
    if random is None or not isinstance(task, DrawsImages):
        return {}

    def draw() -> NDArray[np.float32]:
        with evaluating(run.network), run.network.autocast():
            drawn: NDArray[np.float32] = task.images(run.network.module, random()).float().cpu().numpy()
        return drawn

    images = {LIVE: draw()}
    for name, average in run.bank.items():
        if average.started:
            with average.swapped_into(run.network.module):
                images[name] = draw()
    return images


def write_result(
    run_dir: Path, images: Mapping[str, NDArray[np.float32]], logger: Logger, step: int
) -> dict[str, float | str]:
    """Write the report of a run that is done and hand its pictures and tables to the loggers; on rank 0.

    Returns:
        The summary for the loggers: best live and best average, and which average that was.
    """
    if images and images[LIVE].shape[1] in (1, 3):  # latents have no colours to show
        averages = {name: drawn for name, drawn in images.items() if name != LIVE}
        write_grid(run_dir / "report" / SAMPLES, images[LIVE], averages)
    write_report(run_dir)
    for picture in sorted((run_dir / "report").glob("*.png")):
        logger.image(step, f"report/{picture.stem}", str(picture))
    done = read_run(run_dir)
    for table in (table_of(done, metric) for metric in done.metrics):
        logger.table(
            step,
            f"report/{table.title.rpartition(': ')[2]}",
            table.headers,
            [line.keys for line in table.lines],
        )
    return summarise(run_dir)


def print_result(run_dir: Path) -> None:
    """Live weights against every average by the primary metric, a line for each other one, and where the report is."""
    print_tables(brief(read_run(run_dir)))
    print(f"report: {run_dir / 'report' / 'index.html'}")


def summarise(run_dir: Path) -> dict[str, float | str]:
    """`best/live/<metric>`, `best/ema/<metric>` and `best/ema/name` by the primary metric."""
    done = read_run(run_dir)
    rows = rows_of(done, done.primary_metric)
    higher = bool(done.higher_is_better(done.primary_metric))
    summary: dict[str, float | str] = {}
    live = [row for row in rows if row.weights == LIVE and row.best is not None]
    averages = [row for row in rows if row.weights != LIVE and row.best is not None]
    if live and live[0].best is not None:
        summary[f"best/live/{done.primary_metric}"] = live[0].best.value
    best = best_of((row.best.value for row in averages if row.best is not None), higher)
    if best is not None:
        summary[f"best/ema/{done.primary_metric}"] = best
        summary["best/ema/name"] = next(
            row.weights for row in averages if row.best is not None and row.best.value == best
        )
    return summary


@dataclass(frozen=True)
class Again:
    """Command lines about a run, ready to type: in as many processes, and trusting what this one trusted."""

    run_dir: RunDir
    allowed: list[str]
    """Targets that the command line allowed."""
    world_size: int

    def resume(self, *overrides: str) -> str:
        """The command that carries the run on."""
        trusted = [f"allow_targets=[{','.join(self.allowed)}]"] if self.allowed else []
        return self._command(f"resume={os.path.relpath(self.run_dir.path)}", *trusted, *overrides)

    def next_commands(self, steps: int) -> list[str]:
        """Look again, train on, repeat with another seed."""
        own = ("run_dir=", "resume=", "seed=", "allow_targets=")
        latest = {override.partition("=")[0]: override for override in self.run_dir.all_overrides()}
        same = [override for override in without_clearing([*latest.values()]) if not override.startswith(own)]
        return [
            f"python -m launch.compare {shlex.quote(os.path.relpath(self.run_dir.path))}",
            self.resume(f"trainer.steps={2 * steps}"),
            self._command(*same, "seed=1"),
        ]

    def _command(self, *overrides: str) -> str:
        launcher = "python" if self.world_size == 1 else f"torchrun --nproc-per-node={self.world_size}"
        return f"{launcher} -m trainer {shlex.join(overrides)}"
