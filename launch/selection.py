"""Which checkpoint of a run, and which of the weights in it: one meaning for every command that asks."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from trainer.checkpoint.continuity import check_config
from trainer.checkpoint.format import committed
from trainer.checkpoint.store import stored_scalars
from trainer.errors import ConfigError
from trainer.report.runs import Run, read_run
from trainer.rundir.directory import RunDir
from trainer.rundir.keys import AVERAGE, LIVE


@dataclass(frozen=True)
class Chosen:
    """A checkpoint."""

    path: Path
    step: int
    averages: list[str]
    """Averages in it that may be meant; where the best was asked for, those that were compared."""
    note: str | None = None
    """What whoever asked for the best should know of it."""


def choose_checkpoint(run_dir: RunDir, wanted: str | int, patterns: Sequence[str] = ("*",)) -> Chosen:
    """The checkpoint of `last`, of `best` or of a step.

    `best` is the checkpoint, of those that are kept, at whose step any of the weights that `patterns` name had its best
    evaluation by the primary metric; of equals the earliest. Runs keep few checkpoints and evaluate between them:
    where another step was better, `note` says which.

    Raises:
        ConfigError: there is none; those that exist are listed. Or the configuration with which it was saved is gone.
    """
    chosen = _choose(run_dir, wanted, patterns)
    check_config(run_dir, chosen.path)
    return chosen


def _choose(run_dir: RunDir, wanted: str | int, patterns: Sequence[str]) -> Chosen:
    found = {int(path.name.removeprefix("step-")): path for path in committed(run_dir.checkpoints)}
    if not found:
        raise ConfigError(f"RUN_DIR: {run_dir.path} has no checkpoint yet")
    there = f"checkpoints are of {_listed('step', list(found))}"
    if wanted == "best":
        run = read_run(run_dir.path)
        names = _meant(patterns, stored_averages(found[max(found)]), run.averages)
        step, note = _best_step(run, names, list(found), there)
        there_too = [name for name in stored_averages(found[step]) if f"{AVERAGE}{name}" in names]
        return Chosen(found[step], step, there_too, note)
    step = max(found) if wanted == "last" else int(wanted)
    if step not in found:
        raise ConfigError(f"step: there is no checkpoint of step {step}; {there}")
    return Chosen(found[step], step, stored_averages(found[step]))


def _meant(patterns: Sequence[str], newest: Sequence[str], evaluated: Sequence[str]) -> list[str]:
    """The weights that patterns name among those that the run keeps now; else, among all that it ever had."""
    try:
        return choose_weights(patterns, newest)
    except ConfigError:
        # One that had not started was never evaluated; one that a session dropped is in older checkpoints only.
        return choose_weights(patterns, [*dict.fromkeys([*evaluated, *newest])])


def _best_step(run: Run, names: Sequence[str], kept: Sequence[int], there: str) -> tuple[int, str | None]:
    metric = run.primary_metric
    higher = run.higher_is_better(metric)
    if higher is None:
        raise ConfigError(
            f"step=best: {run.path / 'meta.json'} does not say whether more {metric} is better; give a step"
        )
    better = max if higher else min
    at: dict[int, tuple[float, str]] = {}
    for name in names:
        for step, value in run.evaluation(name.removeprefix(AVERAGE), metric).finite().pairs():
            at[step] = better(at.get(step, (value, name)), (value, name), key=lambda one: one[0])
    left = sorted(at.keys() & set(kept))
    if not left:
        raise ConfigError(
            f"step=best: expected a checkpoint at whose step {' or '.join(names)} was evaluated by {metric}; {there}"
        )
    best, of_all = (better(steps, key=lambda step: at[step][0]) for steps in (left, sorted(at)))
    if at[of_all][0] == at[best][0]:
        return best, None
    told = [f"step {step} ({metric} {at[step][0]:.5g}, {at[step][1]})" for step in (best, of_all)]
    return best, f"step=best: {told[0]} is the best that is kept; {told[1]} was better and has no checkpoint"


def stored_averages(checkpoint: Path) -> list[str]:
    """Names of the averages in a checkpoint, in its order.

    Raises:
        ConfigError: it cannot be read.
    """
    progress = stored_scalars(checkpoint).get("progress")
    names = progress.get("averages") if isinstance(progress, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{checkpoint}: expected the names of the run's averages in its state.json")
    return names


def choose_weights(patterns: Sequence[str], averages: Sequence[str]) -> list[str]:
    """The weights that any pattern names: `live` first, then `ema/<name>` as the checkpoint lists them.

    `ema` alone is the average of a run that keeps one.

    Raises:
        ConfigError: a pattern names nothing; what there is is listed.
    """
    names = [LIVE, *(f"{AVERAGE}{name}" for name in averages)]
    found: set[str] = set()
    for pattern in patterns:
        meant = names[1] if pattern == "ema" and len(averages) == 1 else pattern
        named = {name for name in names if fnmatchcase(name, meant)}
        if not named:
            raise ConfigError(f"weights: expected one of {', '.join(names)}, got {pattern or 'nothing'}")
        found |= named
    return [name for name in names if name in found]


def choose_one(weights: str, averages: Sequence[str]) -> str:
    """The one that `weights` names, as `choose_weights` does.

    Raises:
        ConfigError: it names none, or several.
    """
    first, *others = choose_weights([weights], averages)
    if others:
        raise ConfigError(f"weights: expected one, and {weights} names {', '.join([first, *others])}")
    return first


def _listed(word: str, numbers: Sequence[int]) -> str:
    return f"{word}{'s'[: len(numbers) != 1]} {', '.join(map(str, numbers))}"
