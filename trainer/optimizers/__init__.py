"""Optimizers of this project and of others, learning-rate schedule, gradient clipping, steps skipped if not finite.

`optimizer._target_` may name a class of this package. All functions accept plain parameters and DTensor parameters
(FSDP2), with uneven and empty shards.
"""

from trainer.optimizers.loss_scale import LossScale
from trainer.optimizers.making import make_optimizer
from trainer.optimizers.schedule import lr_factor
from trainer.optimizers.steps import (
    changed_settings,
    class_name,
    clip_grad_norm,
    parts_of,
    set_lr,
    step_unless,
)

__all__ = [
    "LossScale",
    "changed_settings",
    "class_name",
    "clip_grad_norm",
    "lr_factor",
    "make_optimizer",
    "parts_of",
    "set_lr",
    "step_unless",
]
