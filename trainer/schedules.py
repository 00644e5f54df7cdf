"""Built-in learning-rate schedules (`trainer.protocols.Schedule`), which `schedule.name` selects.

An argument with the name of a key of the group `schedule` gets the value of that key. `trainer.optimizers.lr_factor`
adds the warm-up. The decays begin after it and reach `min_ratio` at the last step.
"""

import math


def constant(step: int, steps: int) -> float:
    """Return 1: the learning rate stays at its peak."""
    return 1.0


def cosine(step: int, steps: int, warmup_steps: int = 0, min_ratio: float = 0.0) -> float:
    """Return a factor that decays by half a cosine over all steps after the warm-up."""
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * _done(step, warmup_steps, steps))) / 2


def wsd(
    step: int, steps: int, warmup_steps: int = 0, decay_fraction: float = 0.2, min_ratio: float = 0.0
) -> float:
    """Return 1 until the last `decay_fraction` of the run, then a factor that decays linearly."""
    peak = max(warmup_steps, steps - round(decay_fraction * steps))
    return min_ratio + (1 - min_ratio) * (1 - _done(step, peak, steps))


def inverse_sqrt(step: int, steps: int, warmup_steps: int = 0) -> float:
    """Return sqrt(w / step) with w = max(1, `warmup_steps`): it continues the warm-up and never ends.

    The learning rate does not depend on the length of the run, so a run can be stopped or continued at any step.
    """
    return math.sqrt(max(1, warmup_steps) / step)


def _done(step: int, peak: int, steps: int) -> float:
    return min(1.0, max(0, step - peak) / max(1, steps - peak))
