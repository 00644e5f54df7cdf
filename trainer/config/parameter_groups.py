"""The parameter groups of a run: their patterns and settings, from `optimizer.groups`. Imports no torch."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf, ValidationError

from trainer.config.fields import check_fields
from trainer.config.schema import OptimizerConfig
from trainer.errors import ConfigError


@dataclass
class GroupFields:
    """The keys of one entry of `optimizer.groups`; a key that is left out keeps the value of the group `optimizer`."""

    params: list[str] = dataclasses.field(default_factory=list)
    """Shell patterns (`blocks.*`) of the names of the group's parameters; the first group that matches takes one."""
    ndim: int | None = None
    """Number of dimensions of the group's parameters; null takes all."""
    lr: float | None = None
    """Peak learning rate, at least 0."""
    lr_factor: float | None = None
    """Factor of `optimizer.lr`, at least 0, in place of `lr`."""
    name: str | None = None
    """Class name in `torch.optim`. With `name` or `_target_` the group's `args` alone are those of its optimizer."""
    _target_: str | None = None
    """Dotted path of an optimizer class or function, as `optimizer._target_`; it replaces `name`."""
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of the optimizer, added to `optimizer.args`."""
    decay_vectors: bool | None = None
    """Whether tensors with fewer than two dimensions get weight decay too."""


@dataclass(frozen=True)
class ParameterGroup:
    """One entry of `optimizer.groups` with the settings of its optimizer."""

    key: str
    """Config key of the entry."""
    params: list[str]
    """Shell patterns of names."""
    ndim: int | None
    """Number of dimensions of the group's parameters; None means any."""
    settings: OptimizerConfig
    """Settings of the group's optimizer, without groups."""


def settle_groups(config: OptimizerConfig) -> list[ParameterGroup]:
    """Return the entries of `optimizer.groups` in order, with the settings that they take from `optimizer`.

    Raises:
        ConfigError: A key is unknown or missing, or a value is refused; names the key.
    """
    groups = []
    for name, fields in config.groups.items():
        key = f"optimizer.groups.{name}"
        own = _fields(fields, key)
        changed: dict[str, Any] = {
            "lr": _lr(own, config.lr, key),
            "decay_vectors": config.decay_vectors if own.decay_vectors is None else own.decay_vectors,
            "args": {**config.args, **own.args},
            "groups": {},
        }
        if own.name or own._target_:
            changed |= {"args": own.args, "name": own.name or config.name, "_target_": own._target_}
        groups.append(ParameterGroup(key, own.params, own.ndim, dataclasses.replace(config, **changed)))
    return groups


def _fields(fields: Any, key: str) -> GroupFields:
    check_fields(
        fields,
        GroupFields,
        key,
        "the keys of a group, as in {params: [blocks.*]}",
        otherwise=f"arguments of the optimizer are {key}.args.*",
    )
    try:
        own = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(GroupFields), dict(fields)))
    except ValidationError as error:
        reason = " ".join(str(error.msg or error).split())
        raise ConfigError(f"{key}.{error.full_key or ''}: {reason}") from error
    assert isinstance(own, GroupFields)
    if not own.params:
        raise ConfigError(f"{key}.params: expected patterns of parameter names, as in [blocks.*]")
    for field in ("name", "_target_"):
        if getattr(own, field) == "":
            raise ConfigError(f"{key}.{field}: expected a name, got ''")
    return own


def _lr(own: GroupFields, peak: float, key: str) -> float:
    for field in ("lr", "lr_factor"):
        value = getattr(own, field)
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(f"{key}.{field}: expected a number of at least 0, got {value!r}")
    if own.lr is not None and own.lr_factor is not None:
        raise ConfigError(f"{key}.lr_factor: {key}.lr is set too; set only one of the two")
    if own.lr is not None:
        return own.lr
    return peak if own.lr_factor is None else peak * own.lr_factor
