"""The average in place of the live weights, for a while: by shard, in the same storage, undone bit for bit."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ema.background import release_all_live
from ema.shards import assign
from ema.walk import Walk, local

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
