"""Decide whether a step may be absorbed: by the caller's flag, or by a check of the live weights."""

import torch
import torch.distributed as dist
from torch import Tensor

from ema.walk import Walk, is_dtensor, local

Taken = bool | Tensor
"""Whether the optimizer took the step; a scalar bool tensor where only the device knows."""


def known(finite: bool | Tensor) -> Taken:
    """`finite` as a bool wherever that needs no waiting, as a bool tensor on its device otherwise.

    Raises:
        TypeError: for a tensor of several elements, or a sharded one (ranks must not differ, so give the whole).
    """
    if not isinstance(finite, Tensor):
        return bool(finite)
    if is_dtensor(finite) or finite.numel() != 1:
        raise TypeError(
            f"finite: expected a bool or a plain scalar tensor, got {type(finite).__name__} {finite.shape}"
        )
    finite = finite.detach().reshape(()).to(torch.bool)
    return finite if finite.device.type != "cpu" else bool(finite)


def weights_finite(walk: Walk) -> bool:
    """Whether all floating-point parameters are finite on all ranks. Waits for the device.

    Collectives: one all-reduce of one number if the model is sharded.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    sharded = None
    for slot in walk.params.values():
        part = local(slot.tensor)
        if is_dtensor(slot.tensor):
            sharded = slot.tensor
        if (part.is_floating_point() or part.is_complex()) and part.numel():
            groups.setdefault((part.device, part.dtype), []).append(part)
    good = all(
        bool(torch.isfinite(torch.stack(torch._foreach_norm(parts, float("inf")))).all())
        for parts in groups.values()
    )
    if sharded is None:
        return good
    bad = torch.tensor(0 if good else 1, device=sharded.device_mesh.device_type)  # type: ignore[attr-defined]
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return not bool(bad)
