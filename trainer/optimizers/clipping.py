"""Norm and clipping of gradients, of plain parameters and of DTensors (FSDP2) with uneven and empty shards."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their global L2 norm is at most `max_norm`, without waiting for the device.

    Unlike torch's function, this one accepts plain and sharded parameters together and returns a plain tensor. If the
    norm is not finite, the gradients are not changed.

    Args:
        parameters: parameters; those without a gradient are skipped.
        max_norm: largest norm, at least 0; 0 computes the norm without scaling.

    Returns:
        The norm before clipping, 0-dimensional, float32, equal on all ranks; 0 if there are no gradients.

    Collectives: one all-reduce of one number per mesh that gradients are sharded over.
    """
    with torch.no_grad():
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        if not trainable:
            return torch.zeros(())
        grads, squares = _squared_norms(trainable, trainable[0].device)
        norm = torch.stack(squares).sum().sqrt().float()
        if max_norm > 0 and grads:
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(grads, torch.where(norm.isfinite(), scale, 1.0))
        return norm


def _squared_norms(parameters: list[nn.Parameter], device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Return this rank's parts of the gradients, and one float64 squared norm over all ranks per layout."""
    # Grouped by parameter, not by gradient: a rank without a gradient must still join the all-reduce.
    layouts: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        tensor: Any = parameter
        sharded = isinstance(tensor, DTensor)
        local = layouts.setdefault((tensor.device_mesh, tensor.placements) if sharded else None, [])
        if tensor.grad is not None:
            grad = tensor.grad.to_local() if sharded else tensor.grad
            if grad.is_complex():
                # A tensor that is conjugated lazily has no real view; its conjugate has, of the same memory.
                grad = torch.view_as_real(grad.conj() if grad.is_conj() else grad)
            local.append(grad)
    squares = []
    for layout, local in layouts.items():
        # float64: the square of a large float32 norm would overflow and look like a non-finite gradient
        square = torch.zeros((), dtype=torch.float64, device=device)
        for dtype in (torch.float32, torch.float64):  # a norm cannot be narrower than its tensor
            own = [grad for grad in local if (grad.dtype == torch.float64) == (dtype == torch.float64)]
            if own:
                square += torch.stack(torch._foreach_norm(own, 2, dtype)).double().square().sum()
        if layout is not None:
            mesh, placements = layout
            for dim, placement in enumerate(placements):
                if not placement.is_replicate():  # replicas hold the same gradient, so they are not summed
                    dist.all_reduce(square, group=mesh.get_group(dim))
        squares.append(square)
    return [grad for local in layouts.values() for grad in local], squares
