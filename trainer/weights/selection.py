"""Choice of a checkpoint of a run (`step=`) and of weights in it (`weights=`), for all commands."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from trainer.checkpoint.continuity import check_config
from trainer.checkpoint.store import stored_progress
from trainer.errors import ConfigError
from trainer.report.runs import read_run
from trainer.rundir.checkpoints import committed, step_of
from trainer.rundir.directory import RunDir
from trainer.rundir.keys import AVERAGE, BEST, LIVE
from trainer.weights.best_step import best_step


@dataclass(frozen=True)
class Chosen:
    """Chosen checkpoint."""

    path: Path
    step: int
    """Optimizer step of the checkpoint."""
    averages: list[str]
    """Names of the averages to choose from: all in the checkpoint or, for `best`, those that were compared."""
    patterns: list[str]
    """Names and patterns of the weights as they were asked for, but the name of the best ones in place of `best`."""
    note: str | None = None
    """Note for the user if a step without a checkpoint was better."""


def choose_checkpoint(run_dir: RunDir, wanted: str | int, patterns: Sequence[str] = ("*",)) -> Chosen:
    """Return the checkpoint that `step=` asks for.

    `best` is the kept checkpoint at whose step one of the named weights had its best evaluation by the primary metric;
    of equal ones, the earliest. A run also evaluates at steps without a checkpoint: if one of them was better, the
    result's `note` names it. With `best` among the weights too, all weights of all sessions are compared, and `best`
    are those that had this evaluation.

    Args:
        run_dir: Directory of the run.
        wanted: `last`, `best` or a number of steps.
        patterns: Names and patterns of the weights that `best` compares.

    Raises:
        ConfigError: No such checkpoint exists; the message lists the existing ones. Or `meta.json` does not contain the
            configuration with which the checkpoint was saved.
    """
    checkpoints = {step_of(path): path for path in committed(run_dir.checkpoints)}
    if not checkpoints:
        raise ConfigError(f"RUN_DIR: {run_dir.path} has no checkpoint yet")
    steps = "step" if len(checkpoints) == 1 else "steps"
    existing = f"checkpoints exist for {steps} {', '.join(map(str, checkpoints))}"
    names = note = None
    if wanted == BEST:
        run = read_run(run_dir.path)
        if BEST not in patterns:
            names = _named(patterns, stored_progress(checkpoints[max(checkpoints)]).averages, run.averages)
        if (best := best_step(run, checkpoints, names)) is None:
            wanted_weights = "one of the weights" if names is None else " or ".join(names)
            raise ConfigError(
                f"step=best: expected a checkpoint at whose step {wanted_weights} was evaluated by"
                f" {run.primary_metric}; {existing}"
            )
        step, note = best.step, best.note
        patterns = [best.weights if pattern == BEST else pattern for pattern in patterns]
    else:
        step = max(checkpoints) if wanted == "last" else int(wanted)
    if step not in checkpoints:
        raise ConfigError(f"step: {run_dir.path} has no checkpoint of step {step}; {existing}")
    path = checkpoints[step]
    averages = stored_progress(path).averages
    if names is not None:
        averages = [name for name in averages if f"{AVERAGE}{name}" in names]
    check_config(run_dir, path)
    return Chosen(path, step, averages, list(patterns), note)


def _named(patterns: Sequence[str], newest: Sequence[str], evaluated: Sequence[str]) -> list[str]:
    """Return the weights that match the patterns in the newest checkpoint, otherwise in all sessions of the run."""
    try:
        return choose_weights(patterns, newest)
    except ConfigError:
        # Averages that had not started were never evaluated. Averages that a later session removed from the
        # configuration are only in older checkpoints.
        return choose_weights(patterns, [*dict.fromkeys([*evaluated, *newest])])


def choose_weights(patterns: Sequence[str], averages: Sequence[str]) -> list[str]:
    """Return the weights that the patterns match: `live` first, then `ema/NAME` in the order of `averages`.

    The pattern `ema` means the only average, if there is only one.

    Raises:
        ConfigError: A pattern matches no weights; the message lists all.
    """
    names = [LIVE, *(f"{AVERAGE}{name}" for name in averages)]
    chosen: set[str] = set()
    for pattern in patterns:
        full_pattern = names[1] if pattern == "ema" and len(averages) == 1 else pattern
        matches = {name for name in names if fnmatchcase(name, full_pattern)}
        if not matches:
            raise ConfigError(f"weights: expected one of {', '.join(names)}, got {pattern or 'nothing'}")
        chosen |= matches
    return [name for name in names if name in chosen]


def choose_one(weights: str, averages: Sequence[str]) -> str:
    """Return the weights that one name or pattern matches, as in `choose_weights`.

    Raises:
        ConfigError: It matches none or several.
    """
    first, *others = choose_weights([weights], averages)
    if others:
        raise ConfigError(f"weights: expected one, but {weights} matches {', '.join([first, *others])}")
    return first
