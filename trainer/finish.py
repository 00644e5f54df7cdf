"""The end of a run: the report, the printed table, and the commands to type next."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from trainer.evaluation.samples import SAMPLES, Drawn
from trainer.protocols import Logger
from trainer.report import write_report_of
from trainer.report.first_screen import export_command
from trainer.report.format import format_value
from trainer.report.runs import Run as Report
from trainer.report.text.brief import brief
from trainer.report.text.table import table_of
from trainer.report.text.terminal import print_tables
from trainer.report.verdicts import best_of, rows_of
from trainer.rundir.directory import RunDir
from trainer.rundir.keys import AVERAGE, LIVE, average_key
from trainer.shell.commands import (
    command,
    command_lines,
    composition_flags,
    hydra_quoted,
    path_argument,
    shell_quoted,
    train_command,
    trust,
)

WIDER = 3.3
"""Factor of the horizons by which a bank is widened at both ends."""


def write_result(
    done: Report,
    drawn: Drawn | None,
    logger: Logger,
    step: int,
    following: Sequence[Sequence[str]] = (),
    allowed: Sequence[str] = (),
) -> None:
    """Write the report of a finished run, with the commands that may follow, and send its pictures and tables to the
    loggers, on rank 0.
    """
    folder = done.path / "report"
    if drawn is not None:
        drawn.write(folder / f"{SAMPLES}.png")
    write_report_of(done, following, allowed)
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

    def after_finish(self, done: Report, sync: str | None = None) -> list[list[str]]:
        """Return blocks for the end of a run, each a title and lines: what to try if no average won, and commands.

        The commands export the winner, search the decay if snapshots were kept, train to twice the steps, repeat with
        another seed, widen the bank, compare, and upload offline logs.

        Args:
            done: Data of the report.
            sync: Command that uploads offline logs, None without such logs.
        """
        place = path_argument(self.run_dir.path)
        rows = rows_of(done, done.primary_metric)
        winner = next((row.weights for row in rows if row.last.winner), None)
        commands = []
        if winner is not None:
            weights = winner if winner == LIVE else f"{AVERAGE}{winner}"
            commands.append(export_command(self.run_dir.path, weights, self.allowed))
        if self.run_dir.snapshots.is_dir():
            commands.append(command("posthoc", place, *trust(self.allowed)))
        steps = done.settings.get("trainer.steps", "")
        if steps.isdecimal():
            commands.append(self.resume(f"trainer.steps={2 * int(steps)}"))
        if self.typed is not None:
            seed = done.settings.get("seed", "")
            commands.append(self._again("seed=", new=[f"seed={int(seed) + 1 if seed.isdecimal() else 1}"]))
            if (decays := wider_bank(done)) is not None:
                listed = ",".join(f"{decay:.12g}" for decay in decays)
                commands.append(self._again("ema.decay=", "ema.decays=", new=[f"ema.decays=[{listed}]"]))
        lost = (
            len(rows) > 1
            and winner in (None, LIVE)
            and done.higher_is_better(done.primary_metric) is not None
        )
        commands += [command("compare", place), *filter(None, [sync])]
        # The command that uploads comes last.
        return [*([to_try(done)] if lost else []), command_lines("Next:", commands)]

    def _again(self, *dropped: str, new: list[str]) -> str:
        """Return the command that began the run, without overrides that begin with `dropped`, and with new ones."""
        own = ("run_dir=", "accept_changed_records=", "resume_fallback=", *dropped)
        same = [override for override in self.typed or [] if not override.lstrip("+").startswith(own)]
        return self._command(*composition_flags(), *same, *new)

    def _command(self, *overrides: str) -> str:
        return train_command(overrides, self.world_size, self.nodes)


def to_try(done: Report) -> list[str]:
    """Return a title, and lines with overrides that may help after a run in which no average won, and why."""
    cleared = ["ema.decays=[]", "ema.averages=null"] if len(done.averages) > 1 else []
    cleared += ["ema.axis=0"] if _has_axis(done) else []
    cleared += ["ema.axis_grows=false"] if done.settings.get("ema.axis_grows", "").lower() == "true" else []
    tries = []
    if (fell := _last_change(done)) is not None:
        steps = 2 * int(done.settings["trainer.steps"])
        tries.append(([f"trainer.steps={steps}"], f"{fell}: an average lags"))
    tries.append(
        (["ema=fraction", *cleared], "its half-life grows with the run, so no horizon is to be chosen")
    )
    if (decays := constant_decays(done)) is not None:
        horizon = _horizon(decays[0])
        shorter = _decay_of(horizon / 10) or _decay_of(horizon / WIDER)
        if shorter:
            tries.append(
                ([f"ema.decay={shorter:.12g}"], "a shorter horizon forgets the first weights sooner")
            )
    with suppress(ValueError):
        rate = float(done.settings.get("optimizer.lr", "")) / 3
        tries.append(([f"optimizer.lr={rate:.3g}"], "at a lower rate the weights move less within a horizon"))
    return [
        "No average won. Begin the run again with one of:",
        *(line for overrides, why in tries for line in (f"  {shell_quoted(overrides)}", f"    {why}")),
    ]


def _last_change(done: Report) -> str | None:
    """Describe by how much the live weights became better between the last two evaluations; None if they did not."""
    metric = done.primary_metric
    values = done.evaluation(LIVE, metric).finite().pairs()[-2:]
    if len(values) < 2 or not done.settings.get("trainer.steps", "").isdecimal():
        return None
    (before, first), (_, last) = values
    if (last > first) is not bool(done.higher_is_better(metric)) or last == first:
        return None
    change = f"from {format_value(first)} to {format_value(last)}"
    return f"live {metric} still went {change} since step {before}"


def constant_decays(done: Report) -> list[float] | None:
    """Return the sorted decays of a run whose averages all have a constant decay and nothing else of their own."""
    settings = done.settings
    if settings.get("ema.type") != "constant" or settings.get("ema.rule", "None") != "None":
        return None
    if any(key.startswith("ema.averages.") for key in settings) or _has_axis(done):
        return None
    text = settings.get("ema.decays", "[]").strip("[] ")
    try:
        decays = sorted(map(float, text.split(",") if text else [settings.get("ema.decay", "")]))
    except ValueError:
        return None
    return decays if all(0 < decay < 1 for decay in decays) else None


def _has_axis(done: Report) -> bool:
    return done.settings.get("ema.axis", "0") != "0"


def wider_bank(done: Report) -> list[float] | None:
    """Return the decays of a run with one that is shorter and one that is longer, within the steps of the run."""
    decays, steps = constant_decays(done), done.settings.get("trainer.steps", "")
    if decays is None or not steps.isdecimal():
        return None
    shorter, longer = _decay_of(_horizon(decays[0]) / WIDER), _decay_of(_horizon(decays[-1]) * WIDER)
    ends = [shorter, longer if longer and _horizon(longer) <= int(steps) else None]
    more = [decay for decay in ends if decay is not None]
    return sorted({*decays, *more}) if more else None


def _horizon(decay: float) -> float:
    return 1 / (1 - decay)


def _decay_of(horizon: float) -> float | None:
    """Return the decay of a horizon, with one digit that is not 9; None for a horizon of less than two steps."""
    return round(1 - float(f"{1 / horizon:.1g}"), 12) if horizon >= 2 else None
