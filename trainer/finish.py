"""The end of a run: the report, the printed table, and the commands to type next."""

import os
from dataclasses import dataclass

from trainer.protocols import Logger
from trainer.report import write_report_of
from trainer.report.runs import Run as Report
from trainer.report.text.brief import brief
from trainer.report.text.table import table_of
from trainer.report.text.terminal import print_tables
from trainer.report.verdicts import best_of, rows_of
from trainer.rundir.directory import RunDir
from trainer.rundir.keys import LIVE, average_key
from trainer.samples import SAMPLES, Drawn
from trainer.shell.commands import (
    command,
    composition_flags,
    hydra_quoted,
    path_argument,
    train_command,
    trust,
)


def write_result(done: Report, drawn: Drawn | None, logger: Logger, step: int) -> None:
    """Write the report of a finished run and send its pictures and tables to the loggers, on rank 0."""
    folder = done.path / "report"
    if drawn is not None:
        drawn.write(folder / f"{SAMPLES}.png")
    write_report_of(done)
    for picture in sorted(folder.glob("*.png")):
        logger.image(step, f"report/{picture.stem}", str(picture))
    for table in (table_of(done, metric) for metric in done.metrics):
        logger.table(step, f"report/{table.metric}", table.headers, [line.keys for line in table.lines])


def print_result(done: Report) -> None:
    """Print the table of the primary metric, a line for each other metric, and the path of the report."""
    print_tables(brief(done))
    print(f"report: {done.path / 'report' / 'index.html'}")


def summarise(done: Report) -> dict[str, float | str]:
    """Return the best values of the primary metric for the live weights and for the averages, as a summary.

    Keys: `best/live/<metric>`, `best/live/step`, `best/ema/<metric>`, `best/ema/step`, `best/ema/name` and
    `best/ema/decay`, the decay per optimizer step logged last before the best step. Every rule has such a number, so
    all runs can be plotted on one axis; for a constant decay it is the configured one.
    """
    metric = done.primary_metric
    rows = [row for row in rows_of(done, metric) if row.best is not None]
    live = next((row for row in rows if row.weights == LIVE), None)
    averages = [row for row in rows if row.weights != LIVE]
    top = best_of((row.best.value for row in averages if row.best), bool(done.higher_is_better(metric)))
    winner = next((row for row in averages if row.best and row.best.value == top), None)
    summary: dict[str, float | str] = {}
    for kind, row in (("live", live), ("ema", winner)):
        if row is not None and row.best and row.best_steps:
            summary |= {f"best/{kind}/{metric}": row.best.value, f"best/{kind}/step": row.best_steps[0]}
            if row is winner:
                decay = _decay_at(done, row.weights, row.best_steps[0])
                summary |= {
                    "best/ema/name": row.weights,
                    **({} if decay is None else {"best/ema/decay": decay}),
                }
    return summary


def _decay_at(done: Report, name: str, step: int) -> float | None:
    """Return the decay per optimizer step logged last up to `step`, else first after it; None without a record."""
    logged = done.series(average_key(name, "decay")).finite().pairs()
    if not logged:
        return None
    decay = ([value for at, value in logged if at <= step] or [logged[0][1]])[-1]
    every = done.update_every(name)
    # Rounded: 0.999, not 0.9990000000000001.
    return decay if every == 1 else round(decay ** (1 / every), 12)


@dataclass(frozen=True)
class NextCommands:
    """Commands to type after a run, with the same number of processes and the same allowed targets."""

    run_dir: RunDir
    typed: list[str] | None
    """Overrides of the command line that began the run; None if this session resumed the run of another one.

    They are printed again, so they must not come from a file of the run: typing a target allows it.
    """
    allowed: list[str]
    """Prefixes of `_target_` that the command line allowed."""
    world_size: int
    nodes: int

    def resume(self, *overrides: str) -> str:
        """Return the command that continues the run."""
        place = hydra_quoted(os.path.relpath(self.run_dir.path))
        return self._command(f"resume={place}", *trust(self.allowed), *overrides)

    def after_finish(self, steps: int, sync: str | None) -> list[str]:
        """Return commands that compare, train to twice the steps, repeat with another seed, and upload offline logs."""
        commands = [
            command("compare", path_argument(self.run_dir.path)),
            self.resume(f"trainer.steps={2 * steps}"),
        ]
        if self.typed is not None:
            own = ("run_dir=", "seed=", "accept_changed_records=", "resume_fallback=")
            same = [override for override in self.typed if not override.startswith(own)]
            commands.append(self._command(*composition_flags(), *same, "seed=1"))
        return [*commands, *filter(None, [sync])]

    def _command(self, *overrides: str) -> str:
        return train_command(overrides, self.world_size, self.nodes)
