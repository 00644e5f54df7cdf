"""The one hot loop: `shadow <- shadow + gain * (live - shadow)` for several averages over one look at the live weights.

Live tensors are visited in batches that are worked out once per model and remembered (`Layout`):

* shadow and live of one dtype: all tensors of a device in one `torch._foreach_lerp_`;
* mixed dtypes (fp32 shadow of bf16 weights): lerp refuses them, so cast into a scratch of cache size, once for all
  averages, then lerp from there;
* sharded weights of an average in mode `full_tensor`: one gathered tensor at a time (a collective each).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ema.names import Slot, Walk, is_dtensor, local
from ema.shards import gather

PIECE = {"cpu": 1 << 17}
"""Elements cast at a time, by kind of device: what a core's cache holds of live, scratch and shadow."""
PIECE_ELSEWHERE = 1 << 24

Gain = float | Tensor
"""1 - beta. A float64 scalar tensor on the device where only the device knows whether the step was taken."""


@dataclass
class Batch:
    """Live tensors (or flat pieces of them) that are handled in one call."""

    slots: list[Slot]
    bounds: tuple[int, int] | None = None
    """Elements of the flattened tensor, if the batch is a piece of one."""
    lives: list[Tensor] | None = None
    """The tensors themselves where it is safe to keep them; shards are looked up each time."""
    scratch: list[Tensor] | None = None
    """Where they are cast to."""

    def live(self) -> list[Tensor]:
        return self.lives if self.lives is not None else [local(slot.tensor) for slot in self.slots]


@dataclass
class Layout:
    """How to visit the tensors of all averages that cover the same names in the same dtype and mode."""

    version: int
    batches: list[Batch] = field(default_factory=list)
    gathered: list[Slot] = field(default_factory=list)
    signature: list[tuple[Slot, torch.dtype, torch.device]] = field(default_factory=list)
    pointers: list[tuple[Slot, int]] = field(default_factory=list)
    """Storage under the kept pieces: `param.data = ...` swaps it behind an unchanged Parameter."""

    def holds(self) -> bool:
        return all(
            slot.tensor.dtype is dtype and local(slot.tensor).device == device
            for slot, dtype, device in self.signature
        ) and all(local(slot.tensor).data_ptr() == pointer for slot, pointer in self.pointers)


@dataclass
class Lane:
    """The shadow tensors of one average, in the order of a layout."""

    layout: Layout
    batches: list[list[Tensor]]
    gathered: dict[str, Tensor]


def make_layout(walk: Walk, shadows: dict[str, Tensor]) -> Layout:
    """Group the live tensors of `shadows` (shadow by slot name) into batches. No collective."""
    layout = Layout(walk.version)
    direct: dict[tuple[torch.device, torch.dtype], list[Slot]] = {}
    mixed: dict[tuple[torch.device, torch.dtype, torch.dtype], list[Slot]] = {}
    for name, shadow in shadows.items():
        slot = walk.by_name[name]
        live = local(slot.tensor)
        if is_dtensor(slot.tensor) and not is_dtensor(shadow):
            layout.gathered.append(slot)
        elif shadow.dtype == live.dtype:
            direct.setdefault((live.device, live.dtype), []).append(slot)
        else:
            mixed.setdefault((live.device, live.dtype, shadow.dtype), []).append(slot)
    for (device, dtype), slots in direct.items():
        layout.batches.append(Batch(slots, lives=_lasting(slots)))
        layout.signature.append((slots[0], dtype, device))
    for (device, dtype, shadow_dtype), slots in mixed.items():
        layout.batches.extend(_cast_batches(layout, slots, shadows, device, shadow_dtype))
        layout.signature.append((slots[0], dtype, device))
    return layout


def _lasting(slots: list[Slot]) -> list[Tensor] | None:
    # A Parameter always shows its current storage; the local tensor of a DTensor may be replaced.
    return None if any(is_dtensor(slot.tensor) for slot in slots) else [slot.tensor for slot in slots]


def _cast_batches(
    layout: Layout, slots: list[Slot], shadows: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> list[Batch]:
    piece = PIECE.get(device.type, PIECE_ELSEWHERE)
    batches: list[Batch] = []
    small: list[Slot] = []
    for slot in slots:
        live = local(slot.tensor)
        if live.numel() <= piece:
            small.append(slot)
        elif live.stride() != local(shadows[slot.name]).stride():
            # A shadow has no gaps, so equal strides mean that neither has the live tensor; this one may.
            batches.append(Batch([slot], lives=_lasting([slot])))
        else:
            layout.pointers.append((slot, live.data_ptr()))
            for start in range(0, live.numel(), piece):
                end = min(start + piece, live.numel())
                batches.append(Batch([slot], bounds=(start, end), lives=[_flat(live)[start:end]]))
    batches.extend(Batch(pack, lives=_lasting(pack)) for pack in _packs(small, piece))
    sizes = [sum(tensor.numel() for tensor in batch.live()) for batch in batches]
    scratch = torch.empty(max(sizes), dtype=dtype, device=device)
    for batch in batches:
        batch.scratch, start = [], 0
        for tensor in batch.live():
            batch.scratch.append(scratch[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()
    return batches


def _packs(slots: list[Slot], piece: int) -> Iterator[list[Slot]]:
    pack: list[Slot] = []
    filled = 0
    for slot in slots:
        size = local(slot.tensor).numel()
        if pack and filled + size > piece:
            yield pack
            pack, filled = [], 0
        pack.append(slot)
        filled += size
    if pack:
        yield pack


def _flat(tensor: Tensor) -> Tensor:
    """The storage of a tensor without gaps as one dimension, in memory order (whatever its memory format)."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def make_lane(layout: Layout, shadows: dict[str, Tensor]) -> Lane:
    """The tensors of one average's shadow in the order of `layout`."""
    batches = []
    for batch in layout.batches:
        tensors = [local(shadows[slot.name]) for slot in batch.slots]
        if batch.bounds is not None:
            tensors = [_flat(tensors[0])[slice(*batch.bounds)]]
        batches.append(tensors)
    return Lane(layout, batches, {slot.name: shadows[slot.name] for slot in layout.gathered})


def absorb(walk: Walk, work: Sequence[tuple[Lane, Gain]]) -> None:
    """Let each lane take its gain of the live weights.

    Collectives: none, but one all-gather for each sharded parameter that some lane keeps whole (`full_tensor`).
    """
    cohorts: dict[int, list[tuple[Lane, Gain]]] = {}
    for lane, gain in work:
        cohorts.setdefault(id(lane.layout), []).append((lane, gain))
    for members in cohorts.values():
        for position, batch in enumerate(members[0][0].layout.batches):
            lives = batch.live()
            if batch.scratch is not None:
                torch._foreach_copy_(batch.scratch, lives)
                lives = batch.scratch
            for lane, gain in members:
                blend(lane.batches[position], lives, gain)
    for name in walk.params:
        takers = [(lane.gathered[name], gain) for lane, gain in work if name in lane.gathered]
        if takers:
            whole = gather(walk.params[name].tensor.detach())
            for shadow, gain in takers:
                blend([shadow], [whole.to(shadow.device, shadow.dtype)], gain)


def blend(shadows: list[Tensor], lives: list[Tensor], gain: Gain) -> None:
    """`shadow <- shadow + gain * (live - shadow)`, elementwise in place; a gain of 1 copies exactly.

    All tensors of one device and dtype. A tensor gain is used on the device, without waiting for it.
    """
    if isinstance(gain, Tensor):
        change = torch._foreach_sub(lives, shadows)
        torch._foreach_mul_(
            change, gain.to(change[0].device, torch.float32 if _is_low(change[0]) else change[0].dtype)
        )
        torch._foreach_add_(shadows, change)
    elif gain == 1:
        torch._foreach_copy_(shadows, lives)
    else:
        torch._foreach_lerp_(shadows, lives, gain)


def _is_low(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)
