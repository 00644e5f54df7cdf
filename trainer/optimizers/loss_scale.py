"""Dynamic loss scaling for float16, in which small gradients would become 0."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

INITIAL_SCALE = 2.0**16
GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0, 0.5, 2000
"""Factor of the scale after this many finite steps in a row, and after a step that is not finite, as in torch."""


class LossScale:
    """Factor of the loss, changed as `torch.amp.GradScaler` changes it, without waiting for the device.

    It is a power of two, so gradients in float32 lose nothing when they are divided by it. The global gradient norm
    shows an overflow on every rank, so the factor is equal on all ranks without a collective of its own.

    Args:
        device: device of the gradients.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), INITIAL_SCALE, dtype=torch.float32, device=device)
        self.growth = torch.zeros((), dtype=torch.int32, device=device)

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss times the scale, float32."""
        return loss.float() * self.scale

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients of these parameters by the scale, in place."""
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        if local:
            torch._foreach_mul_(local, self.scale.reciprocal())

    def update(self, finite: Tensor) -> None:
        """Change the scale after a step.

        Args:
            finite: whether the gradient norm was finite; 0-dimensional bool, equal on all ranks.
        """
        overflow = (~finite).float()
        torch._amp_update_scale_(self.scale, self.growth, overflow, GROWTH, BACKOFF, GROWTH_INTERVAL)

    def is_usable(self) -> bool:
        """Return whether scale and reciprocal are finite, the scale positive and no count negative; waits for it."""
        bounded = self.scale.isfinite() & self.scale.reciprocal().isfinite()
        return bool(bounded & (self.scale > 0) & (self.growth >= 0))

    def state(self) -> Mapping[str, Tensor]:
        """Return the tensors that a checkpoint stores; loading overwrites them in place."""
        return {"scale": self.scale, "growth": self.growth}
