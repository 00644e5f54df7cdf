"""The one hot loop: `shadow <- shadow + gain * (live - shadow)`, several averages over one look at the live weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ema.background import Background
from ema.finite import Taken
from ema.layout import Lane, Layout
from ema.names import Walk
from ema.shards import gather


@dataclass(frozen=True)
class Share:
    """What one average takes of the live weights at this iteration."""

    lane: Lane
    gain: float
    """1 - beta."""
    taken: Taken
    """Whether it takes anything; a bool tensor where only the device knows."""


def absorb(walk: Walk, shares: Sequence[Share]) -> None:
    """Let each average take its share of the verified live tensors.

    Collectives: none, but one all-gather for each sharded tensor that some average keeps whole (`full_tensor`).
    """
    cohorts: dict[int, list[Share]] = {}
    for share in shares:
        cohorts.setdefault(id(share.lane.layout), []).append(share)
    for members in cohorts.values():
        _start(walk.background, members[0].lane.layout, members)
    for name in {name: None for share in shares for name in share.lane.gathered}:
        whole = gather(walk.by_name[name].tensor.detach())
        for share in shares:
            if name in share.lane.gathered:
                shadow, copied = share.lane.gathered[name]
                gain = 1.0 if copied else share.gain
                blend([shadow], [whole.to(shadow.device, shadow.dtype)], gain, share.taken, copied)


def _start(background: Background, layout: Layout, members: list[Share]) -> None:
    lives = layout.lives()
    if layout.stage is not None:
        _offload(background, layout, layout.stage, lives, members)
        return
    if layout.overlap is not None:
        background.overlap(layout.overlap, lambda: _take(layout, lives, members))
    else:
        _take(layout, lives, members)


def _offload(
    background: Background,
    layout: Layout,
    stage: list[list[Tensor]],
    lives: list[list[Tensor]],
    members: list[Share],
) -> None:
    flag = members[0].taken
    copies = [tensor for group in stage for tensor in group]
    sources = [tensor for group in lives for tensor in group]
    if not isinstance(flag, Tensor):
        background.offload(copies, sources, lambda: _take(layout, stage, members))
        return
    known = torch.empty((), dtype=torch.bool, pin_memory=flag.device.type != "cpu")

    def take_if_known() -> None:
        _take(layout, stage, [Share(share.lane, share.gain, bool(known)) for share in members])

    background.offload([*copies, known], [*sources, flag], take_if_known)


def _take(layout: Layout, lives: list[list[Tensor]], members: list[Share]) -> None:
    for number, group in enumerate(layout.groups):
        for position, batch in enumerate(group.batches):
            found = batch.load(lives[number])
            for share in members:
                blend(share.lane.targets[number][position], found, share.gain, share.taken, group.is_buffer)
    if lives[-1]:
        for share in members:
            blend(share.lane.copies, lives[-1], 1.0, share.taken, True)


def blend(
    shadows: list[Tensor], lives: list[Tensor], gain: float, taken: Taken, maybe_broken: bool = False
) -> None:
    """`shadow <- shadow + gain * (live - shadow)`, elementwise in place; a gain of 1 copies exactly.

    Args:
        shadows: of one device and dtype, unless the gain is 1.
        lives: likewise, of the same shapes.
        gain: 1 - beta.
        taken: False for nothing at all. A bool tensor is used on the device, without waiting for it.
        maybe_broken: whether `lives` may be not finite where `taken` is not true, as buffers may be.
    """
    if taken is False:
        return
    if isinstance(taken, Tensor):
        if not maybe_broken:
            return _blend_if(taken, shadows, lives, gain)
        lives = [
            torch.where(taken.to(shadow.device), live.to(shadow.dtype), shadow)
            for shadow, live in zip(shadows, lives, strict=True)
        ]
    if gain == 1:
        torch._foreach_copy_(shadows, lives)
    elif len(shadows) == 1:
        shadows[0].lerp_(lives[0], gain)
    else:
        torch._foreach_lerp_(shadows, lives, gain)


def _blend_if(taken: Tensor, shadows: list[Tensor], lives: list[Tensor], gain: float) -> None:
    """With a gain of 0 where `taken` is false; foreach knows no gain on the device."""
    for shadow, live in zip(shadows, lives, strict=True):
        # The gain of a low-precision shadow is not rounded to its dtype, as it is not on the host.
        wide = torch.promote_types(shadow.dtype, torch.float32)
        weight = (taken.to(shadow.device) * gain).to(wide)
        if wide == shadow.dtype:
            shadow.lerp_(live, weight)
        else:
            shadow.copy_(torch.lerp(shadow.to(wide), live.to(wide), weight))
