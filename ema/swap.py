"""The average in place of the live weights, for a while: by shard, in the same storage, undone bit for bit."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ema.background import release_all_live
from ema.shards import assign, like
from ema.state import raise_for_names
from ema.walk import Slot, Walk, local

_swapped: dict[int, Any] = {}
"""Average by id of each module that holds its weights now (the modules live as long as the swap)."""


def is_swapped(model: nn.Module) -> bool:
    """Whether some average is swapped into `model` (or a part of it) now: no time to save it as the live model."""
    return any(id(module) in _swapped for module in model.modules())


def is_in_use(average: Any) -> bool:
    """Whether `average` is swapped into some model now."""
    return any(other is average for other in _swapped.values())


def refuse_swapped(walk: Walk, action: str) -> None:
    """Raise a RuntimeError if an average is swapped into the walked model."""
    if _swapped and any(id(module) in _swapped for module in walk.modules):
        raise RuntimeError(
            f"cannot {action} while an average is swapped into the model: its weights are not the live ones"
        )


@contextmanager
def swapped(average: Any, walk: Walk, shadows: Mapping[str, Tensor]) -> Iterator[None]:
    """Write `shadows` (by slot name) into the live tensors; restore them at the end, whatever happened inside.

    Collectives: none. Memory: a copy of each live tensor's local part, as long as the context lasts.
    """
    refuse_swapped(walk, "swap an average in")
    release_all_live()
    modules = list(walk.modules)
    kept: list[tuple[Tensor, Tensor]] = []
    buffers = [(site, site[0][site[1]]) for slot in walk.buffers.values() for site in slot.sites]
    _swapped.update((id(module), average) for module in modules)
    try:
        with torch.no_grad():
            for name, shadow in shadows.items():
                live = walk.by_name[name].tensor
                kept.append((local(live), local(live).clone()))
                assign(live, shadow)
        torch.clear_autocast_cache()
        yield
    finally:
        # A forward inside leaves FSDP2's root unsharded; what is restored must be what is registered.
        walk.reshard()
        with torch.no_grad():
            for live, before in kept:
                live.copy_(before)
        for (owner, key), tensor in buffers:
            owner[key] = tensor
        torch.clear_autocast_cache()
        for module in modules:
            _swapped.pop(id(module), None)


def published_names(model: nn.Module) -> set[str]:
    """Canonical names of the parameters and persistent buffers of `model`, tied ones under each of their names."""
    return set(Walk(model).by_name)


def empty_weights(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Make an uninitialised tensor of each name and dtype, with the shape, device and sharding of the model's own.

    Collectives: none.
    """
    by_name = Walk(model).by_name
    lives = {name: by_name[name].tensor.detach() for name in dtypes}
    return {name: like(live, dtypes[name], local(live).device) for name, live in lives.items()}


@contextmanager
def weights_swapped_into(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Put weights in the place of the live ones while the context lasts, as `swapped_into` puts an average.

    Args:
        model: the live model, wrapped or not.
        weights: by canonical name; a tied tensor once, or under several names with the same values. Live tensors that
            are not named keep their values.

    Collectives: all-gathers of weights that are sharded otherwise than the model; all ranks call.
    """
    walk = Walk(model)
    with swapped(None, walk, {walk.by_name[name].name: tensor for name, tensor in weights.items()}):
        yield


def publish(values: Mapping[str, Tensor], target: Walk) -> None:
    """Write `values` (whole or sharded, by every published name) into the target's parameters and buffers.

    Collectives: all-gathers of values that are sharded otherwise than the target; all ranks call.

    Raises:
        KeyError: naming what the target lacks or has besides.
        ValueError: naming a tensor of another shape, without storage, or tied in the target only.
    """
    raise_for_names(
        missing=[name for name in values if name not in target.by_name],
        unexpected=[name for name in target.by_name if name not in values],
        where="the target model",
    )
    slots = list(target.slots())
    for slot in slots:
        _check(slot, values)
    # The target may be a live model whose weights another average still reads.
    release_all_live()
    for slot in slots:
        assign(slot.tensor, values[slot.name])


def _check(slot: Slot, values: Mapping[str, Tensor]) -> None:
    value = values[slot.name]
    if value.shape != slot.tensor.shape:
        raise ValueError(
            f"{slot.name!r}: expected shape {tuple(value.shape)}, got {tuple(slot.tensor.shape)}"
        )
    if slot.tensor.is_meta:
        raise ValueError(f"{slot.name!r}: expected a tensor with storage, got a meta tensor")
    if slot.tensor.is_floating_point() != value.is_floating_point():
        raise ValueError(f"{slot.name!r}: expected a tensor like {value.dtype}, got {slot.tensor.dtype}")
    for other in slot.names[1:]:
        if values[other] is not value:
            raise ValueError(f"{slot.name!r} and {other!r} are tied in the target but not in the average")
