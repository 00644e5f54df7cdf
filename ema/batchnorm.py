"""Compute the BatchNorm statistics of averaged weights from data: those of the live weights do not fit them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def reestimate_batchnorm(
    model: nn.Module, batches: Iterable[Any], *, forward: Callable[[nn.Module, Any], Any] | None = None
) -> None:
    """Replace the running statistics of all BatchNorm layers by their mean over `batches`.

    This does the same as `torch.optim.swa_utils.update_bn`, with two differences. All other layers are in eval mode (no
    dropout). The mode and the momentum of every module are restored at the end, also after an exception. If the model
    has no BatchNorm layer, no batch is read. A layer that no forward reaches, as one that runs only in train mode,
    keeps its statistics.

    Args:
        model: a model that has the averaged weights, after `copy_to` or inside `swapped_into`. The end of
            `swapped_into` restores the live statistics.
        batches: real inputs on the model's device. If a batch is a tuple or list, its first element is the input.
        forward: a function that calls the model with a batch; `model(batch)` if None.

    Collectives: those of the model's forward.

    Raises:
        ValueError: There is no batch; the statistics are unchanged.
    """
    layers = [
        module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    if not layers:
        return
    seen = 0
    with _restored(model, layers):
        model.eval()
        for layer in layers:
            layer.train()
            layer.reset_running_stats()
            layer.momentum = None
        for batch in batches:
            if forward is not None:
                forward(model, batch)
            else:
                model(batch[0] if isinstance(batch, list | tuple) else batch)
            seen += 1
        if not seen:
            raise ValueError("reestimate_batchnorm: expected at least one batch, got none")


@contextmanager
def _restored(model: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Restore every mode and momentum at the end, the statistics of layers not run, and after an exception of all."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(layer, layer.momentum) for layer in layers]
    before = [[(tensor, tensor.clone()) for tensor in layer.buffers()] for layer in layers]
    restored = before
    try:
        yield
        restored = [
            kept for layer, kept in zip(layers, before, strict=True) if layer.num_batches_tracked == 0
        ]
    finally:
        for tensor, values in chain.from_iterable(restored):
            tensor.copy_(values)
        for layer, momentum in momenta:
            layer.momentum = momentum
        for module, mode in modes:
            module.training = mode
