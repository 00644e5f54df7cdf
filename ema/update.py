"""The one hot loop: `shadow <- shadow + gain * (live - shadow)`, several averages over one look at the live weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ema.finite import Taken
from ema.layout import Lane, Layout
from ema.shards import gather
from ema.walk import Walk


@dataclass(frozen=True)
class Share:
    """What one average takes of the live weights at this iteration."""

    lane: Lane
    gain: float
    """1 - beta."""
    taken: Taken
    """Whether it takes anything; a bool tensor where only the device knows."""


@dataclass(frozen=True)
class Cohort:
    """Shares of one layout, which look at the live weights once."""

    layout: Layout
    lives: list[list[Tensor]]
    shares: list[Share]


def absorb(walk: Walk, shares: Sequence[Share]) -> None:
    """Let each average take its share of the verified live tensors.

    Collectives: none, but one all-gather for each sharded tensor that some average keeps whole (`full_tensor`).
    """
    by_layout: dict[int, list[Share]] = {}
    for share in shares:
        by_layout.setdefault(id(share.lane.layout), []).append(share)
    cohorts = [
        Cohort(members[0].lane.layout, members[0].lane.layout.lives(), members)
        for members in by_layout.values()
    ]
    on_host = [cohort for cohort in cohorts if cohort.layout.stage is not None]
    if on_host:
        # What the update before may raise is raised here, before anything is absorbed.
        walk.background.wait()
    for cohort in cohorts:
        if cohort.layout.stage is None:
            _absorb_here(walk, cohort)
    if on_host:
        _absorb_on_host(walk, on_host)
    for name in {name: None for share in shares for name in share.lane.gathered}:
        whole = gather(walk.by_name[name].tensor.detach())
        for share in shares:
            if name in share.lane.gathered:
                shadow, copied = share.lane.gathered[name]
                gain = 1.0 if copied else share.gain
                blend([shadow], [whole.to(shadow.device, shadow.dtype)], gain, share.taken, copied)


def _absorb_here(walk: Walk, cohort: Cohort) -> None:
    _take(cohort, buffers=True)
    device = cohort.layout.overlap
    if device is None:
        _take(cohort, buffers=False)
        return
    flag = _flag_of([cohort])
    walk.background.overlap(device, flag, lambda kept: _take(_knowing(cohort, kept), buffers=False))


def _absorb_on_host(walk: Walk, cohorts: list[Cohort]) -> None:
    """Copy the live tensors of all cohorts to the CPU and leave the rest to the thread."""
    now: tuple[list[Tensor], list[Tensor]] = [], []
    beside: tuple[list[Tensor], list[Tensor]] = [], []
    for cohort in cohorts:
        layout = cohort.layout
        assert layout.stage is not None
        for group, copies, lives in zip(layout.all_groups, layout.stage, cohort.lives, strict=True):
            into, of = now if group.is_buffer else beside
            into.extend(copies)
            of.extend(lives)
    flag = _flag_of(cohorts)
    known = None
    if flag is not None:
        known = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=not flag.is_cpu)
        now[0].append(known)
        now[1].append(flag)

    def take_all() -> None:
        for cohort in cohorts:
            assert cohort.layout.stage is not None
            staged = _knowing(
                replace(cohort, lives=cohort.layout.stage), None if known is None else bool(known)
            )
            _take(staged, buffers=True)
            _take(staged, buffers=False)

    walk.background.offload(now, beside, take_all)


def _flag_of(cohorts: list[Cohort]) -> Tensor | None:
    """The flag on the device, which all shares that have one have in common."""
    flags = (share.taken for cohort in cohorts for share in cohort.shares)
    return next((flag for flag in flags if isinstance(flag, Tensor)), None)


def _knowing(cohort: Cohort, taken: Taken | None) -> Cohort:
    """With `taken` in the place of the flag on the device."""
    if taken is None:
        return cohort
    shares = [
        replace(share, taken=taken) if isinstance(share.taken, Tensor) else share for share in cohort.shares
    ]
    return replace(cohort, shares=shares)


def _take(cohort: Cohort, *, buffers: bool) -> None:
    for number, group in enumerate(cohort.layout.groups):
        if group.is_buffer is not buffers:
            continue
        for position, batch in enumerate(group.batches):
            found = batch.load(cohort.lives[number])
            for share in cohort.shares:
                blend(share.lane.targets[number][position], found, share.gain, share.taken, buffers)
    if buffers and cohort.lives[-1]:
        for share in cohort.shares:
            blend(share.lane.copies, cohort.lives[-1], 1.0, share.taken, True)


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
            _blend_if(taken, shadows, lives, gain)
            return
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
        # The gain is not rounded to a low-precision shadow's dtype, as it is not on the host.
        wide = torch.promote_types(shadow.dtype, torch.float32)
        weight = taken.to(shadow.device, wide) * gain
        if wide == shadow.dtype:
            shadow.lerp_(live, weight)
        else:
            shadow.copy_(torch.lerp(shadow.to(wide), live.to(wide), weight))
