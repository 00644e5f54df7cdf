"""Make the optimizers of a model: one for each entry of `optimizer.groups`, and one for all other parameters."""

import inspect
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from trainer.config.parameter_groups import ParameterGroup, settle_groups
from trainer.config.schema import OptimizerConfig
from trainer.config.targets import no_such_argument
from trainer.config.trust import resolve_target
from trainer.distributed.sharding import parameter_names
from trainer.errors import ConfigError, blamed_on, listed, near
from trainer.optimizers.steps import Composite, note_start

FUSED_ON_SHARDS = (torch.optim.Adam, torch.optim.AdamW)
"""Optimizers whose fused kernel takes DTensors (torch 2.13)."""


def make_optimizer(model: nn.Module, config: OptimizerConfig, allowed: Sequence[str] = ()) -> Optimizer:
    """Make the optimizer over the trainable parameters of the model.

    Each entry of `optimizer.groups` has an optimizer of its own, over the parameters that it is the first to match. The
    other parameters have the optimizer of the group `optimizer`. In each, tensors with fewer than two dimensions
    (biases, norms) get no weight decay, unless `decay_vectors` is set. A tied parameter appears once.

    Args:
        model: model, after sharding.
        config: optimizer group of the configuration.
        allowed: further prefixes that `optimizer._target_` may start with.

    Raises:
        ConfigError: The class or an argument is unknown, a value is refused, a pattern matches nothing, or no parameter
            is trainable or one is float16.
    """
    names = {parameter: name for parameter, name in parameter_names(model).items() if parameter.requires_grad}
    if not names:
        raise ConfigError("model: expected at least one trainable parameter, got none")
    if any(parameter.dtype == torch.float16 for parameter in names):
        raise ConfigError(
            "model: expected trainable parameters in float32 or bfloat16 (sharding.param_dtype=float16 computes in"
            " float16 with weights in float32), got float16"
        )
    parts = []
    for group in settle_groups(config):
        taken = _take(names, group)
        parts.append(_make(taken, group.settings, group.key, allowed))
    if names:
        parts.insert(0, _make(list(names), config, "optimizer", allowed))
    else:  # a mistake in these settings is refused too
        _optimizer_kind(config, "optimizer", allowed)
    return parts[0] if len(parts) == 1 else Composite(parts)


def _take(names: dict[nn.Parameter, str], group: ParameterGroup) -> list[nn.Parameter]:
    """Remove the parameters of a group from `names`, and return them in the order of the model."""
    fits = {p: name for p, name in names.items() if group.ndim in (None, p.ndim)}
    for pattern in group.params:
        if not any(fnmatchcase(name, pattern) for name in fits.values()):
            kind = (
                "trainable parameter"
                if group.ndim is None
                else f"trainable parameter of {group.ndim} dimensions"
            )
            raise ConfigError(
                f"{group.key}.params: {pattern!r} matches no {kind} that earlier groups leave; they leave"
                f" {listed(list(fits.values())) or 'none'}"
            )
    taken = [p for p, name in fits.items() if any(fnmatchcase(name, pattern) for pattern in group.params)]
    for parameter in taken:
        del names[parameter]
    return taken


def _make(
    trainable: list[nn.Parameter], config: OptimizerConfig, key: str, allowed: Sequence[str]
) -> Optimizer:
    """Make the optimizer of one group; `key` is the config key of its settings."""
    kind, name = _optimizer_kind(config, key, allowed)
    takes = _check_arguments(kind, name, config, key)
    _check_shards(kind, name, config, key, trainable)
    groups: list[dict[str, Any]] = [{"params": trainable}]
    if not config.decay_vectors and "weight_decay" in takes:
        matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
        vectors = [parameter for parameter in trainable if parameter.ndim < 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    # YAML has no tuples, and torch expects `betas` to be one.
    args = {name: tuple(value) if isinstance(value, list) else value for name, value in config.args.items()}
    with blamed_on(f"{key}.args: {name}"):
        made = kind([group for group in groups if group["params"]], lr=config.lr, **args)
    if not isinstance(made, Optimizer):
        raise ConfigError(
            f"{key}._target_: expected a torch.optim.Optimizer, {name} returned {type(made).__name__}"
        )
    named = f"{key}._target_" if config._target_ else f"{key}.name"
    if inspect.unwrap(type(made).step) is inspect.unwrap(Optimizer.step):  # torch has wrapped it
        raise ConfigError(f"{named}: expected an optimizer with a step(), {name} has none of its own")
    if any(
        p.name == "closure" and p.default is p.empty for p in inspect.signature(made.step).parameters.values()
    ):
        raise ConfigError(f"{named}: {name} needs a closure that computes the loss, which is not supported")
    note_start(made, config.lr)
    return made


def _optimizer_kind(config: OptimizerConfig, key: str, allowed: Sequence[str]) -> tuple[Any, str]:
    """Return the optimizer class or function, and its name for messages."""
    if config._target_ is None:
        return _optimizer_class(config.name, key), config.name
    node = {"_target_": config._target_}
    return resolve_target(node, group="optimizer", allowed=allowed, key=key), config._target_


def _check_arguments(kind: Any, name: str, config: OptimizerConfig, key: str) -> list[str]:
    """Refuse arguments that the optimizer does not take; return the names of those that it takes."""
    parameters = list(inspect.signature(kind).parameters.values())[1:]
    takes = [p.name for p in parameters if p.name != "lr" and p.kind is not p.VAR_KEYWORD]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for argument in config.args:
        if argument == "lr":
            raise ConfigError(f"{key}.args.lr: the learning rate is {key}.lr")
        if argument not in takes and not takes_any:
            raise ConfigError(no_such_argument(f"{key}.args.{argument}", name, takes))
    return takes


def _check_shards(
    kind: Any, name: str, config: OptimizerConfig, key: str, trainable: Sequence[nn.Parameter]
) -> None:
    """Refuse optimizers of torch that fail on sharded parameters or compute something else there."""
    if not any(isinstance(parameter, DTensor) for parameter in trainable):
        return
    if config.args.get("fused") and kind not in FUSED_ON_SHARDS:
        raise ConfigError(f"{key}.args.fused: torch has no fused {name} for sharded parameters")
    if kind is torch.optim.Muon:
        raise ConfigError(
            f"{key}.name: torch's Muon takes no sharded parameters; set {key}._target_=trainer.optimizers.muon.Muon,"
            " which gathers each matrix"
        )


def _optimizer_class(name: str, key: str) -> Any:
    kind = getattr(torch.optim, name, None)
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer:
        return kind
    names = [other for other, value in vars(torch.optim).items() if inspect.isclass(value)]
    raise ConfigError(f"{key}.name: torch.optim has no {name!r}{near(name, names, most=3)}")
