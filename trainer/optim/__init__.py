"""Optimizers, learning-rate schedule, gradient clipping, and a step that is skipped if a gradient is not finite.

All functions accept plain parameters and DTensor parameters (FSDP2), with uneven and empty shards.
"""

from trainer.optim.clipping import clip_grad_norm
from trainer.optim.loss_scale import LossScale
from trainer.optim.making import make_optimizer
from trainer.optim.schedule import lr_factor
from trainer.optim.steps import changed_settings, class_name, parts_of, set_lr, step_unless

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
