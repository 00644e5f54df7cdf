"""Divide the live tensors into batches for the update: once per model, and again if the model changes.

A call of a torch function costs microseconds, and for small tensors this is nearly the whole cost. So there are three
kinds of batches:

* `Pack`: small tensors are concatenated into a flat scratch tensor, and their shadows are views into one flat tensor.
  One call concatenates all tensors of equal trailing shape. It reads the Parameters themselves, so no stale view of
  them can be used.
* `Whole`: large tensors of the shadow's dtype are averaged in place.
* `Piece`: large tensors of another dtype (bf16 weights, fp32 shadow) are cast in pieces that fit into the cache,
  because `lerp` needs equal dtypes.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from operator import attrgetter, eq, is_
from typing import Any

import torch
from torch import Tensor

from ema.memory import is_dtensor, local, locals_of, wrapped_like
from ema.walk import Slot, Walk

PIECE = {"cpu": 1 << 17}
"""Elements of a piece, by kind of device: live, scratch and shadow elements together fit into a core's cache."""
PIECE_ELSEWHERE = 1 << 24
"""Elements of a batch on an accelerator: a call takes many tensors, and fewer calls cost less than a cache saves."""
TOGETHER = {"cpu": 1 << 21}
"""Elements of large tensors in a batch: the cache still holds them when the next average of a bank reads them."""
SMALL = {"cpu": 1 << 14}
"""Most elements of a small tensor: up to this size, copying it into a scratch costs less than a call for it alone."""
SMALL_ELSEWHERE = 1 << 16

_shard, _dtype, _shape = attrgetter("_local_tensor"), attrgetter("dtype"), attrgetter("shape")
_tensor = attrgetter("tensor")


@dataclass
class Pack:
    """Small tensors in one flat scratch; their shadows are consecutive in memory, in the same order."""

    names: list[str]
    runs: list[tuple[slice, Tensor]]
    """Ranges of tensors of equal trailing shape, and the part of `flat` that each range is copied to."""
    flat: Tensor
    cast: Tensor | None
    """A scratch in the shadow's dtype; None if the dtypes are equal."""

    def load(self, lives: list[Tensor]) -> list[Tensor]:
        for run, out in self.runs:
            torch.cat(lives[run], out=out)
        return [self.flat if self.cast is None else self.cast.copy_(self.flat)]

    def targets(self, shadows: dict[str, Tensor]) -> list[Tensor]:
        parts = [local(shadows[name]) for name in self.names]
        flat = _joined(parts)
        if flat is None:
            flat = torch.cat([part.reshape(-1) for part in parts])
            start = 0
            for name, part in zip(self.names, parts, strict=True):
                view = flat[start : start + part.numel()].view(part.shape)
                shadows[name] = wrapped_like(shadows[name], view)
                start += part.numel()
        return [flat]


@dataclass
class Whole:
    """Tensors that are averaged one by one, after a cast if the dtypes differ."""

    names: list[str]
    taken: slice
    cast: list[Tensor] | None

    def load(self, lives: list[Tensor]) -> list[Tensor]:
        found = lives[self.taken]
        if self.cast is None:
            return found
        torch._foreach_copy_(self.cast, found)
        return self.cast

    def targets(self, shadows: dict[str, Tensor]) -> list[Tensor]:
        return [local(shadows[name]) for name in self.names]


@dataclass
class Piece:
    """Consecutive elements of one large tensor that must be cast."""

    name: str
    bounds: slice
    view: Tensor
    cast: Tensor

    def load(self, lives: list[Tensor]) -> list[Tensor]:
        return [self.cast.copy_(self.view)]

    def targets(self, shadows: dict[str, Tensor]) -> list[Tensor]:
        return [_flat(local(shadows[self.name]))[self.bounds]]


Batch = Pack | Whole | Piece
"""`load` returns the live values in the shadow's dtype, `targets` the shadow tensors of one average for them."""


@dataclass
class Group:
    """Live tensors of one device and dtype, whose shadows have one dtype."""

    slots: list[Slot]
    is_buffer: bool
    sharded: bool
    batches: list[Batch] = field(default_factory=list)
    kept: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)
    """Position, data pointer and strides of tensors whose batches keep views of them."""

    def __post_init__(self) -> None:
        self.names = [slot.name for slot in self.slots]
        self._tensors = [slot.tensor for slot in self.slots]
        lives = self.lives()
        self._dtypes = [live.dtype for live in lives]
        self._shapes = [live.shape for live in lives]
        self._device = lives[0].device if lives else None

    def lives(self) -> list[Tensor]:
        """Return the present tensors, of sharded ones this rank's shard."""
        if self.is_buffer:
            # A module may assign a new tensor to a buffer at each step.
            return locals_of(list(map(_tensor, self.slots)))
        # The walk has checked that these are still registered. The shard of a DTensor may have been replaced.
        return list(map(_shard, self._tensors)) if self.sharded else self._tensors

    def fits(self, lives: list[Tensor]) -> bool:
        """Return whether the batches still fit the live tensors, which `lives` returned.

        `param.data = ...` can change dtype, device, shape or storage of a Parameter that is still the same object.
        """
        # There may be thousands of tensors, so the loops run in C. All tensors of a model change their device together.
        return not lives or (
            all(map(is_, map(_dtype, lives), self._dtypes))
            and all(map(eq, map(_shape, lives), self._shapes))
            and lives[0].device == self._device
            and not (self.kept and self._moved(lives))
        )

    def _moved(self, lives: list[Tensor]) -> bool:
        return any(
            lives[position].data_ptr() != pointer or lives[position].stride() != stride
            for position, pointer, stride in self.kept
        )


@dataclass(eq=False)
class Layout:
    """The batches for all averages that have the same coverage, dtype, mode and device."""

    groups: list[Group]
    copied: Group
    """Tensors that are copied, not averaged."""
    gathered: list[Slot]
    """Sharded tensors that the averages keep whole."""
    empty: list[Slot]
    """Tensors without elements on this rank, which are in no batch."""
    stage: list[list[Tensor]] | None = None
    """For averages on the CPU: host copies of all live tensors, by group, with `copied` last."""
    overlap: torch.device | None = None
    """The accelerator that updates these averages on its side stream; None if none does."""

    def __post_init__(self) -> None:
        self.all_groups = [*self.groups, self.copied]
        """The groups, with `copied` last."""

    def lives(self) -> list[list[Tensor]]:
        """Return the present live tensors by group, with those of `copied` last."""
        return [group.lives() for group in self.all_groups]

    def fitting_lives(self) -> list[list[Tensor]] | None:
        """Return the present live tensors as `lives` does; None if the batches do not fit them any more."""
        if any(local(slot.tensor).numel() for slot in self.empty):
            return None
        found = []
        for group in self.all_groups:
            lives = group.lives()
            if not group.fits(lives):
                return None
            found.append(lives)
        return found


@dataclass
class Lane:
    """The shadow tensors of one average, in the order of a layout."""

    layout: Layout
    targets: list[list[list[Tensor]]]
    """Shadow tensors by group and batch."""
    copies: list[Tensor]
    gathered: dict[str, tuple[Tensor, bool]]
    """Whole shadows of sharded tensors by name, and whether they are copies."""


def make_layout(
    walk: Walk, shadows: dict[str, Tensor], copied: Collection[str], *, staged: bool, overlap: bool
) -> Layout:
    """Divide the live tensors of an average into groups and batches. No collective.

    Args:
        walk: the live tensors.
        shadows: of the average, by slot name.
        copied: names of tensors that are copied, not averaged.
        staged: whether the shadows are on the CPU and are updated from host copies of the live tensors.
        overlap: whether an accelerator updates the shadows on its side stream.
    """
    tables: dict[tuple[bool, bool, bool, Any, Any, Any], list[Slot]] = {}
    copies: list[Slot] = []
    gathered: list[Slot] = []
    empty: list[Slot] = []
    for name, shadow in shadows.items():
        slot = walk.by_name[name]
        live = local(slot.tensor)
        if is_dtensor(slot.tensor) and not is_dtensor(shadow):
            gathered.append(slot)
        elif name in copied:
            copies.append(slot)
        elif live.numel():
            is_buffer = name in walk.buffers
            small = not is_buffer and _is_small(live, local(shadow))
            kind = (small, is_buffer, is_dtensor(slot.tensor), live.device, live.dtype, shadow.dtype)
            tables.setdefault(kind, []).append(slot)
        else:
            empty.append(slot)
    groups = []
    for (small, is_buffer, sharded, *_), slots in tables.items():
        if small:
            slots.sort(key=lambda slot: tuple(local(slot.tensor).shape[1:]))
        groups.append(Group(slots, is_buffer, sharded))
    layout = Layout(groups, Group(copies, is_buffer=True, sharded=False), gathered, empty)
    if overlap or staged:
        accelerator = _accelerator({device for *_, device, _, _ in tables})
        layout.overlap = accelerator if overlap else None
    if staged:
        layout.stage = [_host_copies(lives) for lives in layout.lives()]
    for number, ((small, *_), group) in enumerate(zip(tables, groups, strict=True)):
        lives = layout.stage[number] if layout.stage else group.lives()
        _fill(group, lives, [local(shadows[name]) for name in group.names], small=small, staged=staged)
    return layout


def _fill(group: Group, lives: list[Tensor], parts: list[Tensor], *, small: bool, staged: bool) -> None:
    """Divide the live tensors of a group into batches."""
    if small:
        group.batches = list(_packs(group.names, lives, parts))
    elif group.is_buffer or parts[0].dtype == lives[0].dtype:
        size = TOGETHER.get(parts[0].device.type, PIECE_ELSEWHERE)
        group.batches = [
            _whole(group.names, taken, lives, parts) for taken in ranges(map(Tensor.numel, lives), size)
        ]
    else:
        group.batches = list(_cast(group.names, lives, parts))
        if not staged:
            kept = {batch.name for batch in group.batches if isinstance(batch, Piece)}
            group.kept = [
                (position, lives[position].data_ptr(), lives[position].stride())
                for position, name in enumerate(group.names)
                if name in kept
            ]


def make_lane(layout: Layout, shadows: dict[str, Tensor], copied: Collection[str]) -> Lane:
    """Return the shadows in the order of `layout`; small ones are moved so that they are consecutive in memory."""
    return Lane(
        layout,
        [[batch.targets(shadows) for batch in group.batches] for group in layout.groups],
        [local(shadows[name]) for name in layout.copied.names],
        {slot.name: (shadows[slot.name], slot.name in copied) for slot in layout.gathered},
    )


def _accelerator(devices: set[torch.device]) -> torch.device | None:
    """Return the device other than the CPU; None if all tensors are on the CPU."""
    found = [device for device in devices if device.type != "cpu"]
    if len(found) > 1:
        raise ValueError(
            f"EMAConfig.device, EMAConfig.overlap: expected all parameters on one device, got {sorted(map(str, found))}"
        )
    if found and not hasattr(torch.get_device_module(found[0]), "Stream"):
        raise ValueError(
            f"EMAConfig.device, EMAConfig.overlap: expected a device with streams, got {found[0]}"
        )
    return found[0] if found else None


def _is_small(live: Tensor, shadow: Tensor) -> bool:
    # `cat` takes no scalars, and it would change the memory format of tensors that are not contiguous.
    return (
        live.numel() <= SMALL.get(live.device.type, SMALL_ELSEWHERE)
        and live.ndim > 0
        and live.is_contiguous()
        and shadow.is_contiguous()
    )


def _host_copies(lives: list[Tensor]) -> list[Tensor]:
    """Make uninitialised tensors like these on the CPU, pinned if a device writes them; one allocation per dtype."""
    pinned = any(live.device.type != "cpu" for live in lives)
    sizes: dict[torch.dtype, int] = {}
    for live in lives:
        sizes[live.dtype] = sizes.get(live.dtype, 0) + live.numel()
    flats = {
        dtype: torch.empty(size, dtype=dtype, device="cpu", pin_memory=pinned)
        for dtype, size in sizes.items()
    }
    copies = []
    for live in lives:
        part, flats[live.dtype] = flats[live.dtype].tensor_split([live.numel()])
        dense = torch.empty_like(live, device="meta").stride()
        copies.append(part.as_strided(live.shape, dense))
    return copies


def _packs(names: list[str], lives: list[Tensor], shadows: list[Tensor]) -> Iterator[Pack]:
    device, dtype, cast_to = shadows[0].device, lives[0].dtype, shadows[0].dtype
    taken_together = list(ranges(map(Tensor.numel, lives), PIECE.get(device.type, PIECE_ELSEWHERE)))
    size = max(sum(live.numel() for live in lives[taken]) for taken in taken_together)
    scratch = torch.empty(size, dtype=dtype, device=device)
    cast = None if cast_to == dtype else torch.empty(size, dtype=cast_to, device=device)
    for taken in taken_together:
        runs, begin, start = [], taken.start, 0
        for trailing, members in groupby(lives[taken], key=lambda live: live.shape[1:]):
            run = list(members)
            rows, end = sum(len(live) for live in run), start + sum(live.numel() for live in run)
            runs.append((slice(begin, begin + len(run)), scratch[start:end].view(rows, *trailing)))
            begin, start = begin + len(run), end
        yield Pack(names[taken], runs, scratch[:start], None if cast is None else cast[:start])


def ranges(sizes: Iterable[int], limit: int) -> Iterator[slice]:
    """Divide tensors of these sizes into ranges of at most `limit` elements, or of one tensor."""
    begin, filled, position = 0, 0, -1
    for position, size in enumerate(sizes):
        if position > begin and filled + size > limit:
            yield slice(begin, position)
            begin, filled = position, 0
        filled += size
    yield slice(begin, position + 1)


def _whole(names: list[str], taken: slice, lives: Sequence[Tensor], shadows: list[Tensor]) -> Whole:
    pairs = list(zip(lives, shadows, strict=True))[taken]
    mixed = any(live.dtype != shadow.dtype for live, shadow in pairs)
    return Whole(names[taken], taken, [torch.empty_like(shadow) for _, shadow in pairs] if mixed else None)


def _cast(names: list[str], lives: list[Tensor], shadows: list[Tensor]) -> Iterator[Batch]:
    """Cast large tensors into one scratch: on the CPU piece by piece, elsewhere many in one call."""
    kind = shadows[0].device.type
    size = PIECE.get(kind, PIECE_ELSEWHERE)
    longest = min(size, sum(live.numel() for live in lives))
    scratch = torch.empty(longest, dtype=shadows[0].dtype, device=shadows[0].device)
    for taken in ranges(map(Tensor.numel, lives), 0 if kind in PIECE else size):
        live, shadow = lives[taken.start], shadows[taken.start]
        if sum(one.numel() for one in lives[taken]) <= size and kind not in PIECE:
            ends = accumulate(one.numel() for one in shadows[taken])
            parts = [
                scratch[end - one.numel() : end].as_strided(one.shape, one.stride())
                for end, one in zip(ends, shadows[taken], strict=True)
            ]
            yield Whole(names[taken], taken, parts)
        elif live.stride() != shadow.stride():
            # A shadow has no gaps, so equal strides mean that neither has the live tensor; this one may.
            yield _whole(names, taken, lives, shadows)
        else:
            for start in range(0, live.numel(), size):
                bounds = slice(start, min(start + size, live.numel()))
                yield Piece(names[taken.start], bounds, _flat(live)[bounds], scratch[: bounds.stop - start])


def _flat(tensor: Tensor) -> Tensor:
    """Return a tensor without gaps as one dimension, in memory order, for any memory format."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _joined(parts: list[Tensor]) -> Tensor | None:
    """Return one flat tensor if contiguous `parts` are consecutive in one storage, None otherwise."""
    first = parts[0]
    place = first.storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        if part.storage_offset() != place or not part.is_contiguous():
            return None
        place += part.numel()
    return first.as_strided((place - first.storage_offset(),), (1,))
