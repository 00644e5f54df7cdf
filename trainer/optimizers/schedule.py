"""Learning-rate schedule: a pure function of the step, so it has no state to save."""

import inspect
import math
from collections.abc import Callable, Sequence

from trainer.config.schema import ScheduleConfig
from trainer.config.targets import bind
from trainer.config.trust import resolve_target
from trainer.config.validate import settings_read
from trainer.errors import ConfigError, blamed_on


def lr_factor(config: ScheduleConfig, steps: int, allowed: Sequence[str] = ()) -> Callable[[int], float]:
    """Return the schedule as a function from the step, counted from 1, to the factor of `optimizer.lr`.

    The factor of the warm-up is `step / warmup_steps`. After it, the function that the configuration names gives the
    factor.

    Args:
        config: schedule group of the validated configuration.
        steps: number of optimizer steps of the whole run.
        allowed: further prefixes that `schedule._target_` may start with.

    Raises:
        ConfigError: The target is not allowed or does not exist, an argument is unknown, or the function fails at the
            last step or returns no finite number of at least 0. The returned function raises it for other steps.
    """
    target = config._target_ or f"trainer.schedules.{config.name}"
    schedule = resolve_target({"_target_": target}, group="schedule", allowed=allowed)
    takes = inspect.signature(schedule).parameters
    shared = ("warmup_steps", "decay_fraction", "min_ratio")
    for key in shared:
        if key in config.args:
            raise ConfigError(f"schedule.args.{key}: set schedule.{key}, which the schedule gets")
    args = {key: getattr(config, key) for key in shared if key in takes} | config.args
    schedule = bind(schedule, args, key="schedule.args", called_with=("step", "steps"))
    warmup = config.warmup_steps

    def factor(step: int) -> float:
        if step <= warmup:
            return step / warmup
        with blamed_on(f"schedule: {target}"):
            found = float(schedule(step, steps))
        if not (math.isfinite(found) and found >= 0):
            raise ConfigError(
                f"schedule: {target}: expected a finite factor of at least 0 at step {step}, got {found:g}"
            )
        return found

    if warmup < steps:
        factor(steps)

    return factor


def warmup_warnings(config: ScheduleConfig, steps: int) -> list[str]:
    """Return a warning if the warm-up leaves no step of the run to a built-in schedule that decays."""
    if (
        config._target_ is not None
        or config.warmup_steps < steps
        or "min_ratio" not in settings_read(config.name)
    ):
        return []
    return [
        f"schedule.warmup_steps: {config.warmup_steps} steps of warm-up in a run of {steps}: the learning rate never"
        f" decays, as schedule={config.name} would after it"
    ]
