"""Which checkpoint of a run, and which of the weights in it."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from trainer.checkpoint_format import committed
from trainer.config import ConfigError
from trainer.report.read import LIVE, Run, read_run
from trainer.report.rows import best_of
from trainer.rundir import RunDir


def choose_checkpoint(run_dir: RunDir, wanted: str | int) -> tuple[Path, int]:
    """The checkpoint of `last`, of `best` or of a step, and its step.

    `best` is the earliest of the best finite value of the primary metric, of the live weights or of any average, among
    the steps that still have a checkpoint.

    Raises:
        ConfigError: there is none; those that exist are listed.
    """
    found = {int(path.name.removeprefix("step-")): path for path in committed(run_dir.checkpoints)}
    if not found:
        raise ConfigError(f"RUN_DIR: {run_dir.path} has no checkpoint yet")
    there = f"checkpoints are of {_listed('step', list(found))}"
    if wanted == "last":
        step = max(found)
    elif wanted == "best":
        run = read_run(run_dir.path)
        higher = bool(run.higher_is_better(run.primary_metric))
        of_step = {
            at: number
            for at in found
            if (number := best_of(_values_at(run, at), higher_is_better=higher)) is not None
        }
        if not of_step:
            raise ConfigError(f"step: expected a checkpoint that was evaluated for best; {there}")
        step = (max if higher else min)(sorted(of_step), key=lambda at: of_step[at])
    elif wanted in found:
        step = int(wanted)
    else:
        raise ConfigError(f"step: there is no checkpoint of step {wanted}; {there}")
    return found[step], step


def _values_at(run: Run, step: int) -> list[float]:
    """The primary metric of the live weights and of every average, where they were evaluated at `step`."""
    return [
        number
        for weights in [LIVE, *run.averages]
        for at, number in run.evaluation(weights, run.primary_metric).pairs()
        if at == step
    ]


def choose_weights(patterns: Sequence[str], averages: Sequence[str]) -> list[str]:
    """The weights that any pattern names: `live` first, then `ema/<name>` as the checkpoint lists them.

    Raises:
        ConfigError: a pattern names nothing; what there is is listed.
    """
    names = [LIVE, *(f"ema/{name}" for name in averages)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"weights: {pattern!r} names none of {', '.join(names)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _listed(word: str, numbers: Sequence[int]) -> str:
    return f"{word}{'s'[: len(numbers) != 1]} {', '.join(map(str, numbers))}"
