"""What a step does with the optimizer: clip the gradients, set the learning rates, and step if the norm is finite.

Several optimizers may act as one (`Composite`). Gradients may be DTensors (FSDP2) with uneven and empty shards.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

_STARTING_SETTINGS = "_starting_settings"
"""Attribute of an optimizer: the settings of its parameter groups before the first step."""
_PEAK_LR = "_peak_lr"
"""Attribute of an optimizer: the learning rate that the schedule multiplies by its factor."""


class Composite(Optimizer):
    """Several optimizers over different parameters, with the interface of one.

    It has no state of its own: `param_groups` and `state` are those of its parts, in their order.

    Args:
        parts: optimizers, at least 1, none of them a Composite.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        # torch's constructor would copy the groups and patch `step`; each part has done that for itself.
        self.parts = list(parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Parameter groups of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """State of all parts, in a new dict; a change of it has no effect."""
        return {key: value for part in self.parts for key, value in part.state.items()}

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take the step of every part."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of every part."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> Any:
        """Register a hook that runs before the first part changes its parameters."""
        return self.parts[0].register_step_pre_hook(hook)

    def state_dict(self) -> Any:
        """Raise, because a checkpoint holds the parts by the names of their parameters."""
        raise NotImplementedError(
            "a composite has no state of its own; parts_of(optimizer) are its optimizers"
        )

    load_state_dict = state_dict  # type: ignore[assignment]


def parts_of(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimizers of a composite, or the optimizer itself."""
    return optimizer.parts if isinstance(optimizer, Composite) else [optimizer]


def class_name(optimizer: Optimizer) -> str:
    """Return the name of the optimizer's class; of several optimizers each class once, as in `AdamW + Muon`."""
    return " + ".join(dict.fromkeys(type(part).__name__ for part in parts_of(optimizer)))


def note_start(optimizer: Optimizer, lr: float) -> None:
    """Record the peak learning rate and the settings of an optimizer that has just been made.

    Args:
        optimizer: optimizer, not a composite.
        lr: peak learning rate, at least 0.
    """
    # The values too: while a tensor lives, no other one has its id.
    start = [(_settings(group), list(group.values())) for group in optimizer.param_groups]
    setattr(optimizer, _STARTING_SETTINGS, start)
    setattr(optimizer, _PEAK_LR, lr)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Return a comparable copy of the settings of a parameter group, without those that the run sets."""
    return {
        key: (id(value), value._version) if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in group.items()
        if key not in ("params", "lr")
    }


def changed_settings(optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """Return the settings that the steps of the optimizer have changed: its state, by position of the group.

    Some optimizers count their steps there, or keep an estimate. The result is empty for an optimizer that
    `make_optimizer` has not made.
    """
    starts = [start for part in parts_of(optimizer) for start in getattr(part, _STARTING_SETTINGS, [])]
    changed = {}
    for position, ((start, _), group) in enumerate(zip(starts, optimizer.param_groups, strict=False)):
        now = _settings(group)
        keys = [key for key in now if key not in start or now[key] != start[key]]
        if keys:
            changed[str(position)] = {key: group[key] for key in keys}
    return changed


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


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Set every learning rate to its peak times `factor`; a tensor is changed in place, as `capturable` needs.

    Args:
        optimizer: result of `make_optimizer`.
        factor: factor of the schedule, at least 0.
    """
    for part in parts_of(optimizer):
        lr = getattr(part, _PEAK_LR) * factor
        for group in part.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


def step_unless(optimizer: Optimizer, finite: Tensor) -> None:
    """Take the optimizer's step if `finite` is true; else leave weights and optimizer state unchanged.

    Fused optimizers (`optimizer.args.fused=true`: Adam, AdamW, SGD, Adagrad) decide on the device, by the mechanism of
    `torch.amp.GradScaler`, so the host does not wait. For all other optimizers the host reads `finite` first, which
    waits for a GPU.

    Args:
        optimizer: optimizer whose parameters have gradients.
        finite: whether to take the step; 0-dimensional bool, equal on all ranks.
    """
    parts = parts_of(optimizer)
    if not all(map(_decides_on_device, parts)):
        if finite:  # read once: a second read would wait for the first part's kernels
            optimizer.step()
        return
    for part in parts:
        _step_on_device(part, finite)


def _decides_on_device(optimizer: Optimizer) -> bool:
    return getattr(optimizer, "_step_supports_amp_scaling", False) and not _makes_momentum(optimizer)


def _step_on_device(optimizer: Optimizer, finite: Tensor) -> None:
    scaled: Any = optimizer
    scaled.grad_scale, scaled.found_inf = None, (~finite).float()
    try:
        optimizer.step()
    finally:
        del scaled.grad_scale, scaled.found_inf


def _makes_momentum(optimizer: Optimizer) -> bool:
    """Return whether this step makes momentum buffers, which torch's fused SGD leaves uninitialised when it skips."""
    return any(
        parameter.grad is not None and "momentum_buffer" not in optimizer.state.get(parameter, {})
        for group in optimizer.param_groups
        if group.get("momentum")
        for parameter in group["params"]
    )
