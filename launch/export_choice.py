"""Which weights of which checkpoint an export takes. No torch here: what is asked for in vain is refused at once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from launch.export_files import Destination
from trainer.config import ConfigError
from trainer.report.read import LIVE, Run, read_run
from trainer.rundir import RunDir


@dataclass(frozen=True)
class Options:
    """What is exported, and how; names are not looked up yet."""

    run_dir: RunDir
    weights: str
    out: Destination
    step: str
    dtype: str
    max_shard_bytes: int
    allowed: list[str]


def average_of(weights: str, averages: Sequence[str]) -> str | None:
    """Name of the average that `weights=` names among these; None for the live weights.

    Raises:
        ConfigError: it names none; the message lists those that there are.
    """
    known = {f"ema/{name}": name for name in averages}
    if len(known) == 1:
        known["ema"] = averages[0]
    if weights == LIVE:
        return None
    if weights not in known:
        expected = ", ".join([LIVE, *known])
        raise ConfigError(f"weights: expected one of {expected}, got {weights or 'nothing'}")
    return known[weights]


def choose_step(options: Options, steps: Sequence[int]) -> int:
    """The step whose checkpoint is exported.

    Args:
        options: the step as it was asked for, and of which weights.
        steps: those of the checkpoints that there are, rising.

    Raises:
        ConfigError: there is no checkpoint of that step.
    """
    if not steps:
        raise ConfigError(f"{options.run_dir.path}: the run has no checkpoint yet")
    if options.step == "last":
        return steps[-1]
    if options.step == "best":
        run = read_run(options.run_dir.path)
        return best_step(run, average_of(options.weights, run.averages) or LIVE, steps)
    if not options.step.isdecimal() or int(options.step) not in steps:
        near = _nearest(int(options.step), steps) if options.step.isdecimal() else [steps[-1]]
        kept = " or ".join(f"step={step}" for step in near)
        raise ConfigError(
            f"step: expected best, last or a step whose checkpoint is kept ({kept}), got {options.step or 'nothing'}"
        )
    return int(options.step)


def best_step(run: Run, weights: str, steps: Sequence[int]) -> int:
    """The step of the best evaluation of `weights` by the run's primary metric.

    Raises:
        ConfigError: there is no such evaluation, or no checkpoint of its step.
    """
    metric = run.primary_metric
    more_is_better = run.higher_is_better(metric)
    if more_is_better is None:
        raise ConfigError(
            f"step=best: {run.path / 'meta.json'} does not say whether more {metric} is better; give a step"
        )
    values = {step: value for step, value in run.evaluation(weights, metric) if math.isfinite(value)}
    shown = weights if weights == LIVE else f"ema/{weights}"
    if not values:
        raise ConfigError(f"step=best: {run.path} has no evaluation of {shown} by {metric}; give a step")
    sign = -1 if more_is_better else 1
    best = min(values, key=lambda step: (sign * values[step], step not in steps, step))
    if best in steps:
        return best
    near = [
        f"step={step}" + (f" ({values[step]:.5g})" if step in values else "")
        for step in _nearest(best, steps)
    ]
    raise ConfigError(
        f"step=best: the best {metric} of {shown} ({values[best]:.5g}) was at step {best}, whose checkpoint is not"
        f" kept; nearest to it: {' and '.join(near)}"
    )


def _nearest(step: int, steps: Sequence[int]) -> list[int]:
    """The last step before and the first after."""
    before = [one for one in steps if one <= step]
    after = [one for one in steps if one > step]
    return before[-1:] + after[:1]
