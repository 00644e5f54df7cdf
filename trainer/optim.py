"""Optimizer, learning-rate schedule, gradient clipping, and a step that is skipped if a gradient is not finite.

All functions accept plain parameters and DTensor parameters (FSDP2), with uneven and empty shards. The schedule is a
pure function of the step, so it has no state to save.
"""

import copy
import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from trainer.config.schema import OptimizerConfig, ScheduleConfig
from trainer.config.targets import bind, resolve_target
from trainer.errors import ConfigError, blamed_on

FUSED_ON_SHARDS = ("Adam", "AdamW")
"""Optimizers whose fused kernel takes DTensors (torch 2.13)."""


def make_optimizer(model: nn.Module, config: OptimizerConfig, allowed: Sequence[str] = ()) -> Optimizer:
    """Make the optimizer over the trainable parameters of the model.

    Tensors with fewer than two dimensions (biases, norms) form a parameter group without weight decay, unless
    `decay_vectors` is set. A tied parameter appears once.

    Args:
        model: model, after sharding.
        config: optimizer group of the configuration.
        allowed: further prefixes that `optimizer._target_` may start with.

    Raises:
        ConfigError: The class or an argument is unknown, a value is refused, or no parameter is trainable or one is
            float16.
    """
    kind, name = _optimizer_kind(config, allowed)
    takes = _check_arguments(kind, name, config)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ConfigError("model: expected at least one trainable parameter, got none")
    if any(parameter.dtype == torch.float16 for parameter in trainable):
        raise ConfigError(
            "model: expected trainable parameters in float32 or bfloat16, because small gradients become 0 in float16"
            " without loss scaling, got float16"
        )
    if config.args.get("fused") and name not in FUSED_ON_SHARDS and isinstance(trainable[0], DTensor):
        raise ConfigError(f"optimizer.args.fused: torch has no fused {name} for sharded parameters")
    groups: list[dict[str, Any]] = [{"params": trainable}]
    if not config.decay_vectors and "weight_decay" in takes:
        matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
        vectors = [parameter for parameter in trainable if parameter.ndim < 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    # YAML has no tuples, and torch expects `betas` to be one.
    args = {key: tuple(value) if isinstance(value, list) else value for key, value in config.args.items()}
    with blamed_on(f"optimizer.args: {name}"):
        made = kind([group for group in groups if group["params"]], lr=config.lr, **args)
    if not isinstance(made, Optimizer):
        raise ConfigError(
            f"optimizer._target_: expected a torch.optim.Optimizer, {name} returned {type(made).__name__}"
        )
    if any(
        p.name == "closure" and p.default is p.empty for p in inspect.signature(made.step).parameters.values()
    ):
        key = "optimizer._target_" if config._target_ else "optimizer.name"
        raise ConfigError(f"{key}: {name} needs a closure that computes the loss, which is not supported")
    # The values too: while a tensor lives, no other one has its id.
    start = [(_settings(group), list(group.values())) for group in made.param_groups]
    setattr(made, _STARTING_SETTINGS, start)
    return made


_STARTING_SETTINGS = "_starting_settings"
"""Attribute of an optimizer: the settings of its parameter groups before the first step."""


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
    changed = {}
    for position, (start, _) in enumerate(getattr(optimizer, _STARTING_SETTINGS, [])):
        group = optimizer.param_groups[position]
        now = _settings(group)
        keys = [key for key in now if key not in start or now[key] != start[key]]
        if keys:
            changed[str(position)] = {key: group[key] for key in keys}
    return changed


def _optimizer_kind(config: OptimizerConfig, allowed: Sequence[str]) -> tuple[Any, str]:
    """Return the optimizer class or function, and its name for messages."""
    if config._target_ is None:
        return _optimizer_class(config.name), config.name
    node = {"_target_": config._target_}
    return resolve_target(node, group="optimizer", allowed=allowed), config._target_


def _check_arguments(kind: Any, name: str, config: OptimizerConfig) -> list[str]:
    """Refuse arguments that the optimizer does not take; return the names of those that it takes."""
    parameters = list(inspect.signature(kind).parameters.values())[1:]
    takes = [p.name for p in parameters if p.name != "lr" and p.kind is not p.VAR_KEYWORD]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for argument in config.args:
        if argument == "lr":
            raise ConfigError("optimizer.args.lr: the learning rate is optimizer.lr")
        if argument not in takes and not takes_any:
            raise ConfigError(
                f"optimizer.args.{argument}: {name} takes no such argument; it takes {', '.join(takes)}"
            )
    return takes


def _optimizer_class(name: str) -> Any:
    kind = getattr(torch.optim, name, None)
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer:
        return kind
    near = {other.lower(): other for other, value in vars(torch.optim).items() if inspect.isclass(value)}
    close = [near[match] for match in difflib.get_close_matches(name.lower(), list(near), n=3)]
    raise ConfigError(
        f"optimizer.name: torch.optim has no {name!r}"
        + (f"; did you mean {' or '.join(close)}?" if close else "")
    )


def lr_factor(config: ScheduleConfig, steps: int, allowed: Sequence[str] = ()) -> Callable[[int], float]:
    """Return the schedule as a function from the step, counted from 1, to the factor of `optimizer.lr`.

    The factor of the warm-up is `step / warmup_steps`. After it, the function that the configuration names gives the
    factor.

    Args:
        config: schedule group of the validated configuration.
        steps: number of optimizer steps of the whole run.
        allowed: further prefixes that `schedule._target_` may start with.

    Raises:
        ConfigError: The target is not allowed or does not exist, an argument is unknown, or the function fails at the
            last step.
    """
    target = config._target_ or f"trainer.schedules.{config.name}"
    schedule = resolve_target({"_target_": target}, group="schedule", allowed=allowed)
    takes = inspect.signature(schedule).parameters
    shared = ("warmup_steps", "decay_fraction", "min_ratio")
    for key in shared:
        if key in config.args:
            raise ConfigError(f"schedule.args.{key}: set schedule.{key}, which the schedule gets")
    args = {key: getattr(config, key) for key in shared if key in takes} | config.args
    schedule = bind(schedule, args, key="schedule.args", called_with=("step", "steps"))
    warmup = config.warmup_steps
    if warmup < steps:
        with blamed_on(f"schedule: {target}"):
            float(schedule(steps, steps))

    def factor(step: int) -> float:
        return step / warmup if step <= warmup else float(schedule(step, steps))

    return factor


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group; a tensor is changed in place, as `capturable` needs."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


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
            local.append(tensor.grad.to_local() if sharded else tensor.grad)
    squares = []
    for layout, local in layouts.items():
        # float64: the square of a large float32 norm would overflow and look like a non-finite gradient
        norms = torch._foreach_norm(local, 2, torch.float32) if local else [torch.zeros((), device=device)]
        square = torch.stack(norms).double().square().sum()
        if layout is not None:
            mesh, placements = layout
            for dim, placement in enumerate(placements):
                if not placement.is_replicate():  # replicas hold the same gradient, so they are not summed
                    dist.all_reduce(square, group=mesh.get_group(dim))
        squares.append(square)
    return [grad for local in layouts.values() for grad in local], squares


def step_unless(optimizer: Optimizer, finite: Tensor) -> None:
    """Take the optimizer's step if `finite` is true; else leave weights and optimizer state unchanged.

    Fused optimizers (`optimizer.args.fused=true`: Adam, AdamW, SGD, Adagrad) decide on the device, by the mechanism of
    `torch.amp.GradScaler`, so the host does not wait. For all other optimizers the host reads `finite` first, which
    waits for a GPU.

    Args:
        optimizer: optimizer whose parameters have gradients.
        finite: whether to take the step; 0-dimensional bool, equal on all ranks.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False) or _makes_momentum(optimizer):
        if finite:
            optimizer.step()
        return
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
