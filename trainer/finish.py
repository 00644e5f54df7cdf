"""The end of a run: the report, the printed table, and the commands to type next."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainer.config.own_code import EVALUATED, needed
from trainer.evaluation.samples import SAMPLES, Drawn, write_images
from trainer.protocols import Logger
from trainer.report import write_report_of
from trainer.report.comparison import combine
from trainer.report.earlier import earlier_best
from trainer.report.first_screen import commands_of
from trainer.report.format import format_value
from trainer.report.made import best_made
from trainer.report.runs import Run as Report
from trainer.report.text.brief import brief
from trainer.report.text.table import table_of
from trainer.report.text.terminal import print_tables
from trainer.report.verdicts import best_of, rows_of
from trainer.rundir.directory import RunDir
from trainer.rundir.keys import LIVE, average_key
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
from trainer.shell.stored import may_be_printed

OF_ONE_RUN = ("run_dir=", "resume=", "accept_changed_records=", "resume_fallback=")
"""Beginnings of overrides that concern one session, not what is trained."""
ONE_DECAY = ("ema.decay=", "ema.decays=")
OF_AVERAGES = ("ema=", "ema.type=", "ema.rule", "ema.decay", "ema.axis=", "ema.averages")
"""Beginnings of overrides that choose the averages."""
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
        write_images(folder / f"{SAMPLES}.png", drawn)
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
    best = {
        row.weights: (row.best.value, row.best_steps[0])
        for row in rows_of(done, metric)
        if row.best and row.best_steps
    }
    summary: dict[str, float | str] = {}
    if LIVE in best:
        value, step = best.pop(LIVE)
        summary |= {f"best/live/{metric}": value, "best/live/step": step}
    top = best_of((value for value, _ in best.values()), bool(done.higher_is_better(metric)))
    name = next((name for name, (value, _) in best.items() if value == top), None)
    if name is not None:
        value, step = best[name]
        summary |= {f"best/ema/{metric}": value, "best/ema/step": step, "best/ema/name": name}
        if (decay := _decay_at(done, name, step)) is not None:
            summary["best/ema/decay"] = decay
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
    """Overrides of the command line that began the run; None if this session resumed the run of another one."""
    allowed: list[str]
    """Prefixes of `_target_` that the command line allowed."""
    world_size: int
    nodes: int

    def resume(self, *overrides: str) -> str:
        """Return the command that continues the run."""
        place = hydra_quoted(os.path.relpath(self.run_dir.path))
        words = [f"resume={place}", *trust(self.allowed), *overrides]
        return train_command(words, self.world_size, self.nodes)

    def after_finish(self, done: Report, sync: str | None = None) -> list[list[str]]:
        """Return blocks for the end of a run, each a title and lines: what to try if no average won, and commands.

        The commands export the winner, search the decay if snapshots were kept, train to twice the steps unless an
        earlier step was clearly better, repeat with another seed if this is no fork, widen the bank, export the best
        weights if none won, compare, and upload offline logs (`sync`).
        """
        place = path_argument(self.run_dir.path)
        comparison = combine([done], done.primary_metric)
        exports = [] if comparison is None else [line for _, line in commands_of(comparison, self.allowed)]
        winner = None if comparison is None else comparison.winner
        earlier = None if comparison is None else comparison.earlier
        export = [("export", line) for line in exports]
        is_first = winner is not None or (earlier is not None and earlier.is_kept)
        commands = list(export) if is_first else []
        commands += [("averages of other decays", line) for line in self._posthoc(done)]
        steps = done.settings.get("trainer.steps", "")
        if steps.isdecimal() and earlier is None:
            commands.append(("a longer run", self.resume(f"trainer.steps={2 * int(steps)}")))
        if (began := self._began(done)) is not None:
            if done.fork is None:  # forks share their first steps, so another seed is no further one
                seed = done.settings.get("seed", "")
                new = [f"seed={int(seed) + 1 if seed.isdecimal() else 1}"]
                commands.append(("another seed", self._again(began, ["seed="], new)))
            if (decays := wider_bank(done)) is not None:
                listed = ",".join(f"{decay:.12g}" for decay in decays)
                commands.append(("a wider bank", self._again(began, ONE_DECAY, [f"ema.decays=[{listed}]"])))
        if not is_first:
            commands += export
        lost = (
            comparison is not None
            and len(comparison.rows[0]) > 1
            and (winner is None or winner.weights == LIVE)
            and comparison.higher_is_better is not None
        )
        commands.append(("compare", command("compare", place)))
        if sync is not None:  # the command that uploads comes last
            commands.append(("upload", sync))
        title = f"Next ({', '.join(dict.fromkeys(purpose for purpose, _ in commands))}):"
        lines = command_lines(title, [line for _, line in commands])
        return [*([self.to_try(done)] if lost else []), lines]

    def to_try(self, done: Report) -> list[str]:
        """Return a title, and commands that may help after a run in which no average won, each below its reason.

        They are whole commands unless the beginning of the run is not known; then they are only the overrides.
        """
        began = self._began(done)
        lines = []
        for dropped, overrides, why in tries(done):
            whole = shell_quoted(overrides) if began is None else self._again(began, dropped, overrides)
            lines += [f"{why}:", f"  {whole}"]
        words = "" if began is not None else ", as it was typed,"
        return command_lines(f"No average won. Begin the run again{words} with one of:", lines)

    def _posthoc(self, done: Report) -> list[str]:
        """Return the command that makes averages after the run, if it kept what they are made of."""
        place = path_argument(self.run_dir.path)
        trusted = trust(needed(done.config, self.allowed, EVALUATED))
        if (made := best_made(done)) is not None:
            out = path_argument(Path(f"{done.path.name}_made.safetensors"))
            return [command("posthoc", place, f"decay={made.decay:.6g}", f"export={out}", *trusted)]
        return [command("posthoc", place, *trusted)] if self.run_dir.snapshots.is_dir() else []

    def _began(self, done: Report) -> list[str] | None:
        """Return the words that began the run, with the changes of sessions; None if they may not be printed."""
        if self.typed is not None:
            return [*composition_flags(), *self.typed]
        argv = done.meta.get("argv")
        flags = composition_flags([str(word) for word in argv]) if isinstance(argv, list) else []
        # The last value of a key counts.
        changes = [*done.overrides, *(override for overrides, _ in done.sessions for override in overrides)]
        words = [*flags, *{word.partition("=")[0]: word for word in changes}.values()]
        return words if done.overrides and may_be_printed(words) else None

    def _again(self, began: Sequence[str], dropped: Sequence[str], new: Sequence[str]) -> str:
        """Return the command that begins the run again: without overrides that begin with `dropped`, with new ones."""
        prefixes = (*OF_ONE_RUN, *dropped)
        same = [word for word in began if not word.lstrip("+~").startswith(prefixes)]
        return train_command([*same, *new], self.world_size, self.nodes)


def tries(done: Report) -> list[tuple[Sequence[str], list[str], str]]:
    """Return what may help after a run in which no average won.

    Returns:
        For each the beginnings of overrides that it replaces, new overrides, and the reason.
    """
    cleared = ["ema.decays=[]", "ema.averages=null"] if len(done.averages) > 1 else []
    cleared += ["ema.axis=0"] if _has_axis(done) else []
    cleared += ["ema.axis_grows=false"] if done.settings.get("ema.axis_grows", "").lower() == "true" else []
    cleared += ["ema.rule=null"] if _has_rule(done) else []
    found: list[tuple[Sequence[str], list[str], str]] = []
    if earlier_best(done, done.primary_metric) is None and (fell := _last_change(done)) is not None:
        steps = 2 * int(done.settings["trainer.steps"])
        why = f"{fell}, so an average lags; train longer"
        found.append((["trainer.steps="], [f"trainer.steps={steps}"], why))
    why = "ema=fraction keeps an average whose half-life grows with the run, so you choose no horizon"
    found.append((OF_AVERAGES, ["ema=fraction", *cleared], why))
    if (decays := constant_decays(done)) is not None:
        horizon = _horizon(decays[0])
        shorter = _decay_of(horizon / 10) or _decay_of(horizon / WIDER)
        if shorter:
            why = "a shorter horizon forgets the first weights sooner"
            found.append((ONE_DECAY, [f"ema.decay={shorter:.12g}"], why))
    rate = 0.0
    with suppress(ValueError):
        rate = float(done.settings.get("optimizer.lr", "")) / 3
    if rate > 0:
        why = "at a lower rate the weights move less within a horizon"
        found.append((["optimizer.lr="], [f"optimizer.lr={rate:.3g}"], why))
    return found


def _last_change(done: Report) -> str | None:
    """Describe by how much the live weights became better between the last two evaluations; None if they did not."""
    metric = done.primary_metric
    values = done.evaluation(LIVE, metric).finite().pairs()[-2:]
    if len(values) < 2 or not done.settings.get("trainer.steps", "").isdecimal():
        return None
    (before, first), (_, last) = values
    if (last > first) is not done.higher_is_better(metric) or last == first:
        return None
    change = f"from {format_value(first)} to {format_value(last)}"
    return f"live {metric} still went {change} since step {before}"


def constant_decays(done: Report) -> list[float] | None:
    """Return the sorted decays of a run whose averages all have a constant decay and nothing else of their own."""
    settings = done.settings
    if settings.get("ema.enabled") == "False" or _has_rule(done):
        return None
    if settings.get("ema.type") != "constant":
        return None
    if any(key.startswith("ema.averages.") for key in settings) or _has_axis(done):
        return None
    text = settings.get("ema.decays", "[]").strip("[] ")
    try:
        decays = sorted(map(float, text.split(",") if text else [settings.get("ema.decay", "")]))
    except ValueError:
        return None
    return decays if all(0 < decay < 1 for decay in decays) else None


def _has_rule(done: Report) -> bool:
    """Return whether the averages have a rule of the user's own: the name of a function, or a node with arguments."""
    settings = done.settings
    return settings.get("ema.rule", "None") != "None" or any(key.startswith("ema.rule.") for key in settings)


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
