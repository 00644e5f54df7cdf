"""Writing an average into a model, strictly: every name, every shape, and nothing before all of them are checked."""

from collections.abc import Mapping

from torch import Tensor

from ema.background import release_all_live
from ema.shards import assign
from ema.state import raise_for_names
from ema.walk import Slot, Walk


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
