"""Which weights of which checkpoint an export takes. No torch here: what is asked for in vain is refused at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from launch.export_files import Destination
from trainer.config import ConfigError
from trainer.report.read import LIVE, Run
from trainer.rundir import RunDir


@dataclass(frozen=True)
class Options:
    """What is exported, and how; names are not looked up yet."""

    run_dir: RunDir
    weights: str
    out: Destination
    step: str | int
    """`last`, `best` or a number of steps."""
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


def best_step(run: Run, weights: str, steps: Sequence[int]) -> int:
    """The step of the best evaluation of `weights` by the run's primary metric.

    Unlike an evaluation's, an export's best is not the best of what is left: others would take it for the run's.

    Args:
        run: what was recorded.
        weights: `live`, or the name of an average.
        steps: those of the checkpoints that there are, rising.

    Raises:
        ConfigError: there is no such evaluation, or no checkpoint of its step.
    """
    metric = run.primary_metric
    more_is_better = run.higher_is_better(metric)
    if more_is_better is None:
        raise ConfigError(
            f"step=best: {run.path / 'meta.json'} does not say whether more {metric} is better; give a step"
        )
    values = dict(run.evaluation(weights, metric).finite().pairs())
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
