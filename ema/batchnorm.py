"""BatchNorm statistics of averaged weights: the mean of the live ones does not fit them, so look at data again."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def reestimate_batchnorm(
    model: nn.Module, batches: Iterable[Any], *, forward: Callable[[nn.Module, Any], Any] | None = None
) -> None:
    """Replace the running statistics of all BatchNorm layers by their mean over `batches`.

    Like `torch.optim.swa_utils.update_bn`, but all other layers stay in eval mode (no dropout) and every module's mode
    and momentum is restored, after an exception too. A model without BatchNorm reads no batch.

    Args:
        model: carries the average, e.g. after `copy_to`; inside `swapped_into` the statistics end with the swap.
        batches: real inputs on the model's device; of a tuple or list the first element is the input.
        forward: how to call the model, `model(batch)` if not given.

    Collectives: those of the model's own forward.

    Raises:
        ValueError: if there is no batch, before which the statistics were reset in vain; they are restored.
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
    """Restore every mode and momentum at the end, and the statistics after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(layer, layer.momentum) for layer in layers]
    before = [(tensor, tensor.clone()) for layer in layers for tensor in layer.buffers()]
    try:
        yield
    except BaseException:
        for tensor, values in before:
            tensor.copy_(values)
        raise
    finally:
        for layer, momentum in momenta:
            layer.momentum = momentum
        for module, mode in modes:
            module.training = mode
