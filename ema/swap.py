"""Write averages into models, for the time of a context or permanently.

Programs that read saved averages may use `published_names`, `empty_weights` and `weights_swapped_into`.
"""

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
"""The average that is swapped into each module now, by id of the module.

`swapped` keeps a reference to the modules, so no id is used twice.
"""


def is_swapped(model: nn.Module) -> bool:
    """Return whether an average is swapped into `model` or a part of it, instead of the live weights."""
    return any(id(module) in _swapped for module in model.modules())


def is_in_use(average: Any) -> bool:
    """Return whether `average` is swapped into a model now."""
    return any(other is average for other in _swapped.values())


def refuse_swapped(walk: Walk, action: str) -> None:
    """Raise a RuntimeError if an average is swapped into the model of the walk."""
    if _swapped and any(id(module) in _swapped for module in walk.modules):
        raise RuntimeError(
            f"cannot {action} while an average is swapped into the model: its weights are not the live ones"
        )


@contextmanager
def swapped(average: Any, walk: Walk, shadows: Mapping[str, Tensor]) -> Iterator[None]:
    """Write `shadows` into the live tensors, and restore the live values at the end, also after an exception.

    Args:
        average: average to which the shadows belong, for `is_in_use`.
        walk: walk over the live tensors.
        shadows: shadow tensors by slot name.

    Collectives: none. Memory inside the context: a copy of this rank's part of each live tensor.
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
        # A forward inside leaves the root of FSDP2 unsharded. The sharded parameters must be registered again.
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
    """Return the canonical names of the parameters and persistent buffers of `model`, with all names of tied ones."""
    return set(Walk(model).by_name)


def empty_weights(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Make an uninitialised tensor for each name, with the shape, device and sharding of the model's tensor.

    Args:
        model: live model, wrapped or not.
        dtypes: dtype of each tensor by canonical name.

    Collectives: none.
    """
    by_name = Walk(model).by_name
    lives = {name: by_name[name].tensor.detach() for name in dtypes}
    return {name: like(live, dtypes[name], local(live).device) for name, live in lives.items()}


@contextmanager
def weights_swapped_into(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace the live weights by `weights` inside the context, as `ExponentialMovingAverage.swapped_into` does.

    Args:
        model: live model, wrapped or not.
        weights: new weights by canonical name; a tied tensor needs only one of its names. Live tensors without a new
            weight keep their values.

    Collectives: all-gathers of weights that are sharded in another way than the model; all ranks must call this.
    """
    walk = Walk(model)
    with swapped(None, walk, {walk.by_name[name].name: tensor for name, tensor in weights.items()}):
        yield


def publish(values: Mapping[str, Tensor], target: Walk) -> None:
    """Write `values` into the target's parameters and buffers, after all names and shapes were checked.

    Args:
        values: new values by canonical name, whole or sharded; a tied tensor under each of its names.
        target: walk over the model to write into.

    Collectives: all-gathers of values that are sharded in another way than the target; all ranks must call this.

    Raises:
        KeyError: Only `values` or only the target has some names; the message lists them.
        ValueError: A tensor has another shape, has no storage, or is tied only in the target; the message has its name.
    """
    raise_for_names(
        missing=[name for name in values if name not in target.by_name],
        unexpected=[name for name in target.by_name if name not in values],
        where="the target model",
    )
    slots = list(target.slots())
    for slot in slots:
        _check(slot, values)
    # The target may be a live model whose weights are still read by the update of another average.
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
