"""Write averages into models, for the time of a context or permanently.

Programs that read saved averages may use `published_names`, `empty_weights`, `squares_beside` and
`weights_swapped_into`.
"""

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ema.background import release_all_live
from ema.kept import Kept
from ema.memory import (
    consists_of_others,
    first_conflict,
    like,
    local,
    overlapping,
    overlaps_itself,
    own_caches,
    storage_of,
)
from ema.shards import copy_all, part_for
from ema.squares import block_sums
from ema.state import raise_for_names
from ema.walk import Slot, Walk, in_use

Values = Mapping[str, Tensor | None]
"""New values by name; None for a buffer that becomes None."""


@contextmanager
def swapped(average: Any, walk: Walk, values: Values) -> Iterator[None]:
    """Write `values` into the live tensors, and restore the whole model at the end, also after an exception.

    Args:
        average: average to which the values belong, for `is_in_use`.
        walk: walk over the live tensors.
        values: new values by slot name.

    Collectives: none. Memory inside the context: a copy of this rank's part of each live tensor.

    Raises:
        RuntimeError: A tensor could not be restored at the end; the message names it. All others are restored.
        ValueError: Two live tensors share memory, and the average has different values for them.
    """
    walk.refuse_swapped("swap an average in")
    written = {name: (walk.by_name[name], values[name]) for name in values if name in walk.by_name}
    storages = {storage_of(slot.tensor) for slot, _ in written.values()} - {None}
    if len(storages) < len(written):
        _refuse_conflict((name, slot.tensor, value) for name, (slot, value) in written.items())
    release_all_live()
    kept = Kept(walk)
    errors: list[tuple[str, Exception]] = []
    try:
        with own_caches(), in_use(average, walk.modules, storages):
            try:
                with torch.no_grad():
                    registered = _put(values, walk)
                kept.settle(
                    {id(slot.tensor): value for slot, value in written.values() if value is not None},
                    registered=registered,
                )
                yield
            finally:
                with torch.no_grad():
                    errors = kept.restore()
    finally:
        if errors:
            name, error = errors[0]
            raise RuntimeError(
                f"{name!r} of the live model could not be restored after a swap: {error}"
            ) from error


def _refuse_conflict(writes: Iterable[tuple[str, Tensor, Tensor | None]]) -> None:
    given = {name: (tensor, value) for name, tensor, value in writes if value is not None}
    shared = {
        name for pair in overlapping({name: tensor for name, (tensor, _) in given.items()}) for name in pair
    }
    pair = first_conflict(
        (name, tensor, part_for(tensor, value)) for name, (tensor, value) in given.items() if name in shared
    )
    if pair is not None:
        raise ValueError(
            f"{pair[0]!r} and {pair[1]!r} share memory, and the average has different values for them"
        )


def _put(values: Values, walk: Walk, *, keep: AbstractSet[str] = frozenset()) -> bool:
    """Write values into live tensors, or register them where those cannot be written in place.

    Args:
        values: new values by name of the slot, or of a buffer that is None.
        walk: the live tensors.
        keep: names of buffers that get the dtypes of their values; all others keep their floating-point dtype.

    Returns:
        Whether a tensor was registered.
    """
    in_place = []
    for name, value in values.items():
        slot = walk.by_name.get(name)
        if slot is None:
            if value is not None:
                owner, key = walk.absent[name]
                owner[key] = beside(walk, value)
        elif value is None or (
            name in walk.buffers and not _fits(slot.tensor, value, cast=keep.isdisjoint(slot.names))
        ):
            fresh = None if value is None else beside(walk, value)
            for owner, key in slot.sites:
                owner[key] = fresh
        else:
            in_place.append((slot.tensor, value))
    copy_all(in_place)
    return len(in_place) < len(values)


def _fits(live: Tensor, value: Tensor, cast: bool) -> bool:
    """Return whether `value` can be written into a buffer in place."""
    floats = live.is_floating_point() and value.is_floating_point()
    same = live.dtype == value.dtype or (floats and cast)
    strided = live.layout is torch.strided and value.layout is torch.strided
    # A write into a quantised tensor changes its scale, and one into a tensor that consists of others cannot be undone.
    simple = strided and not live.is_quantized and not consists_of_others(live)
    return same and simple and live.shape == value.shape and not overlaps_itself(local(live))


def beside(walk: Walk, value: Tensor) -> Tensor:
    """Return a copy of `value` on the device of the model's first parameter."""
    with torch.inference_mode(False):
        return value.detach().to(_home(walk), copy=True)


def _home(walk: Walk) -> torch.device:
    return local(next(walk.slots()).tensor).device


def published_names(model: nn.Module) -> set[str]:
    """Return the canonical names of the parameters and persistent buffers of `model`, with all names of tied ones."""
    walk = Walk(model)
    return {*walk.by_name, *walk.absent}


def empty_weights(model: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make an uninitialised tensor for each name, with the device and sharding of the model's tensor.

    Args:
        model: live model, wrapped or not.
        stored: tensors of the shape and dtype to make, by canonical name.

    Collectives: none.
    """
    walk = Walk(model)
    weights = {}
    for name, tensor in stored.items():
        slot = walk.by_name.get(name)
        if slot is not None and slot.tensor.shape == tensor.shape:
            live = slot.tensor.detach()
            weights[name] = like(live, tensor.dtype, local(live).device)
        else:  # a buffer, which may be None or of another shape in a new model
            weights[name] = torch.empty_like(tensor, device=_home(walk))
    return weights


@torch.no_grad()
def squares_beside(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Return the sums of squares of each live parameter and of its difference to `weights`, by the names in these.

    Args:
        model: live model, wrapped or not.
        weights: other weights by canonical name, sharded as the model; those of no parameter are left out.

    Collectives: an all-reduce.
    """
    walk = Walk(model)
    names = {walk.by_name[name].name: name for name in weights if name in walk.by_name}
    parameters = tuple(name for name in walk.params if name in names)

    def parts(some: list[str]) -> list[Tensor]:
        return [local(weights[names[name]]) for name in some]

    _, table = block_sums(walk, parameters, [parts], str)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(table)
    return {
        names[name]: (own, apart) for name, (own, apart, _) in zip(parameters, table.tolist(), strict=True)
    }


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
    names = {name: walk.by_name[name].name if name in walk.by_name else name for name in weights}
    with swapped(None, walk, {names[name]: tensor for name, tensor in weights.items()}):
        yield


def publish(values: Values, target: Walk, copies: set[str], dtype: torch.dtype | None) -> None:
    """Write `values` into the target's parameters and buffers, after all names and shapes were checked.

    Args:
        values: new values by canonical name, whole or sharded; a tied tensor under each of its names.
        target: walk over the model to write into.
        copies: names of buffers whose shape in the target may differ.
        dtype: dtype of the parameters of the model to which the values belong. If the target has the same dtype, its
            copied buffers get the dtypes of their values. All other buffers keep their own.

    Collectives: all-gathers of values that are sharded in another way than the target; all ranks must call this.

    Raises:
        KeyError: Only `values` or only the target has some names; the message lists them.
        ValueError: A tensor has another shape, has no storage, or is tied only in the target; the message has its name.
    """
    raise_for_names(
        missing=[
            name
            for name, value in values.items()
            if name not in target.by_name and not (value is None or name in target.absent)
        ],
        unexpected=[name for name in target.by_name if name not in values],
        where="the target model",
    )
    for slot in target.slots():
        _check(slot, values, slot.name in target.buffers and not copies.isdisjoint(slot.names))
    _refuse_conflict((slot.name, slot.tensor, values[slot.name]) for slot in target.slots())
    # The target may be a live model whose weights are still read by the update of another average.
    release_all_live()
    names = (*(slot.name for slot in target.slots()), *(target.absent.keys() & values.keys()))
    _put({name: values[name] for name in names}, target, keep=copies if target.dtype == dtype else set())


def _check(slot: Slot, values: Values, any_shape: bool) -> None:
    value = values[slot.name]
    for other in slot.names[1:]:
        if values[other] is not value:
            raise ValueError(f"{slot.name!r} and {other!r} are tied in the target but not in the average")
    if is_lazy(slot.tensor):
        raise ValueError(
            f"{slot.name!r} is a lazy tensor without a shape: run one forward of the target first"
        )
    if any_shape:
        return
    if value is None:
        raise ValueError(f"{slot.name!r}: expected None, got a tensor of shape {tuple(slot.tensor.shape)}")
    if value.shape != slot.tensor.shape:
        raise ValueError(
            f"{slot.name!r}: expected shape {tuple(value.shape)}, got {tuple(slot.tensor.shape)}"
        )
    if value.is_meta:
        raise ValueError(f"{slot.name!r}: the live model has no values of it, it is a meta tensor")
    if slot.tensor.is_meta:
        raise ValueError(f"{slot.name!r}: expected a tensor with storage, got a meta tensor")
    if slot.tensor.is_floating_point() != value.is_floating_point():
        raise ValueError(f"{slot.name!r}: expected a tensor like {value.dtype}, got {slot.tensor.dtype}")
    if local(slot.tensor).layout != local(value).layout:
        raise ValueError(f"{slot.name!r}: expected layout {value.layout}, got {slot.tensor.layout}")
    if overlaps_itself(local(slot.tensor)):
        raise ValueError(
            f"{slot.name!r} is an expanded tensor whose elements share memory: make it contiguous()"
        )
