"""Built-in learning-rate schedules (`trainer.protocols.Schedule`), which `schedule.name` selects.

Arguments named as keys of the `schedule` group have the values of these keys. The decays begin after the warm-up,
which `trainer.optim.lr_factor` puts in front, and reach `min_ratio` at the last step.
"""

import math


def constant(step: int, steps: int) -> float:
    """Keep the peak."""
    return 1.0


def cosine(step: int, steps: int, warmup_steps: int = 0, min_ratio: float = 0.0) -> float:
    """Decay by half a cosine over all steps after the warm-up."""
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * _done(step, warmup_steps, steps))) / 2


def wsd(
    step: int, steps: int, warmup_steps: int = 0, decay_fraction: float = 0.2, min_ratio: float = 0.0
) -> float:
    """Keep the peak until the last `decay_fraction` of the run, then decay linearly."""
    peak = max(warmup_steps, steps - round(decay_fraction * steps))
    return min_ratio + (1 - min_ratio) * (1 - _done(step, peak, steps))


def _done(step: int, peak: int, steps: int) -> float:
    return min(1.0, max(0, step - peak) / max(1, steps - peak))
