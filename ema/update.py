"""The update of averages at each step: `shadow <- shadow + gain * (live - shadow)`.

Averages that share a walk are updated together, so that each live tensor is read and cast once for all of them.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ema.coverage import Coverage
from ema.layout import Lane, Layout
from ema.memory import is_dtensor, local
from ema.shards import gather
from ema.track import Taken, Track
from ema.walk import Walk


class Share(NamedTuple):
    """The part of one average in the update of this iteration."""

    track: Track
    lane: Lane
    gain: float
    """1 - beta."""
    taken: Taken
    """Whether the shadow changes."""


Lives = list[list[Tensor]]
"""The live tensors by group of a layout, the copied ones last."""


class Cohort(NamedTuple):
    """Shares of one layout, which are updated from the same live tensors."""

    layout: Layout
    lives: Lives
    shares: list[Share]


@torch.no_grad()
def update_together(
    walk: Walk, tracks: Sequence[Track], model: nn.Module, iteration: int, finite: bool | Tensor
) -> None:
    """Update averages that share a walk, from one reading of the live weights.

    Arguments, collectives and errors as `ExponentialMovingAverage.update`.
    """
    iteration = operator.index(iteration)
    for track in tracks:
        if iteration <= track.counters.last_iteration:
            raise ValueError(
                f"iteration: expected more than the last one, {track.counters.last_iteration}, got {iteration}"
            )
        track.refuse_torn()
    if torch.is_inference_mode_enabled():
        # Tensors that are made in inference mode cannot be updated outside it.
        with torch.inference_mode(False):
            return update_together(walk, tracks, model, iteration, finite)
    taken = step_flag(finite)
    walk.refuse_swapped("update an average")
    before = walk.snapshot()
    try:
        walk.follow(model, "update an average")
        shares, lives, counts = _planned(walk, tracks, iteration, taken)
    except BaseException:
        walk.go_back(before)
        raise
    try:
        absorb(walk, shares, lives)
    except BaseException:
        _tear(shares)
        raise
    for track, absorbed, step_taken in counts:
        track.count(iteration, absorbed, step_taken)


def _planned(
    walk: Walk, tracks: Sequence[Track], iteration: int, taken: Taken
) -> tuple[list[Share], dict[Layout, Lives], list[tuple[Track, Taken | None, Taken]]]:
    """Check the live tensors of an update; no value of an average changes.

    Returns:
        What changes at this iteration, the live tensors by layout, and the arguments of `Track.count` by track.
    """
    lives: dict[Layout, Lives] = {}
    stale = []
    for key, layout in walk.layouts.items():
        fitting = layout.fitting_lives()
        if fitting is None:
            stale.append(key)
        else:
            lives[layout] = fitting
    for key in stale:
        del walk.layouts[key]
    clean: dict[Coverage, bool] = {}
    for track in tracks:
        begun = track.counters.started or iteration >= track.config.start_iter
        if track.config.check_finite and begun:
            track.check_update()
            if track.coverage not in clean:
                clean[track.coverage] = weights_finite(walk, track.coverage)
    if isinstance(taken, Tensor) and any([track.copies_differ() for track in tracks]):
        # The shadow of a buffer changes its shape, which a flag on the device cannot decide.
        taken = bool(taken)
    plans: list[tuple[Track, tuple[float, Taken] | None, Taken]] = []
    for track in tracks:
        broken = track.config.check_finite and not clean.get(track.coverage, True)
        plan = None if broken else track.gain_at(iteration, taken)
        if plan is not None:
            track.check_update()
        plans.append((track, plan, False if broken else taken))
    shares = [Share(track, track.current_lane(), *plan) for track, plan, _ in plans if plan is not None]
    if any([share.lane.layout.stage is not None for share in shares]):
        # An error of the previous update in the thread is raised here, before any shadow changes.
        walk.background.wait()
    counts = [(track, None if plan is None else plan[1], step) for track, plan, step in plans]
    return shares, lives, counts


def step_flag(finite: bool | Tensor) -> Taken:
    """Return `finite` as a bool, or as a bool tensor if it is on another device than the CPU.

    Raises:
        TypeError: `finite` is sharded, so that its value could differ between ranks, or has several elements.
    """
    if not isinstance(finite, Tensor):
        return bool(finite)
    if is_dtensor(finite) or finite.numel() != 1:
        raise TypeError(
            f"finite: expected a bool or a plain scalar tensor, got {type(finite).__name__} {finite.shape}"
        )
    finite = finite.detach().reshape(()).to(torch.bool)
    return finite if finite.device.type != "cpu" else bool(finite)


def weights_finite(walk: Walk, coverage: Coverage) -> bool:
    """Return whether the live tensors that are averaged are finite on all ranks. Waits for the device.

    Collectives: one all-reduce of one number if one of them is sharded.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    sharded = None
    for name in (*coverage.averaged, *coverage.averaged_buffers):
        tensor = walk.by_name[name].tensor
        part = local(tensor)
        if part.is_floating_point() and part.element_size() == 1:
            part = part.float()  # torch has no norm of float8
        if is_dtensor(tensor):
            sharded = tensor
        if part.numel():
            groups.setdefault((part.device, part.dtype), []).append(part)
    good = all(
        bool(torch.isfinite(torch.stack(torch._foreach_norm(parts, float("inf")))).all())
        for parts in groups.values()
    )
    if sharded is None:
        return good
    bad = torch.tensor(0 if good else 1, device=sharded.device_mesh.device_type)  # type: ignore[attr-defined]
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return not bool(bad)


def absorb(walk: Walk, shares: Sequence[Share], lives: Mapping[Layout, Lives]) -> None:
    """Update the shadow of each share from the live tensors, which the walk has checked.

    Args:
        walk: the live tensors.
        shares: what changes.
        lives: live tensors by layout; those of a new layout are read here.

    Collectives: one all-gather for each sharded tensor that an average keeps whole (`full_tensor`).
    """
    by_layout: dict[Layout, list[Share]] = {}
    for share in shares:
        by_layout.setdefault(share.lane.layout, []).append(share)
    cohorts = [
        Cohort(layout, lives.get(layout) or layout.lives(), members) for layout, members in by_layout.items()
    ]
    on_host = [cohort for cohort in cohorts if cohort.layout.stage is not None]
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


def _tear(shares: Sequence[Share]) -> None:
    """Mark averages of which a failed update may have changed some tensors; a copy for undoing it costs too much."""
    for share in shares:
        share.track.torn = True


def _absorb_here(walk: Walk, cohort: Cohort) -> None:
    _blend_cohort(cohort, buffers=True)
    device = cohort.layout.overlap
    if device is None:
        _blend_cohort(cohort, buffers=False)
        return
    flag = _flag_of([cohort])
    walk.background.overlap(device, flag, lambda kept: _blend_cohort(_with_flag(cohort, kept), buffers=False))


def _absorb_on_host(walk: Walk, cohorts: list[Cohort]) -> None:
    """Copy the live tensors of all cohorts to the CPU, and let the thread update the shadows from them."""
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
    flag_on_host = None
    if flag is not None:
        flag_on_host = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=not flag.is_cpu)
        now[0].append(flag_on_host)
        now[1].append(flag)

    def take_all() -> None:
        taken = None if flag_on_host is None else bool(flag_on_host)
        try:
            for cohort in cohorts:
                assert cohort.layout.stage is not None
                staged = _with_flag(cohort._replace(lives=cohort.layout.stage), taken)
                _blend_cohort(staged, buffers=True)
                _blend_cohort(staged, buffers=False)
        except BaseException:
            for cohort in cohorts:
                _tear(cohort.shares)
            raise

    walk.background.offload(now, beside, take_all)


def _flag_of(cohorts: list[Cohort]) -> Tensor | None:
    """Return the flag on the device; it is the same one in all shares that have such a flag."""
    flags = (share.taken for cohort in cohorts for share in cohort.shares)
    return next((flag for flag in flags if isinstance(flag, Tensor)), None)


def _with_flag(cohort: Cohort, taken: Taken | None) -> Cohort:
    """Return the cohort with its flag on the device replaced by `taken`; None replaces nothing."""
    if taken is None:
        return cohort
    shares = [
        share._replace(taken=taken) if isinstance(share.taken, Tensor) else share for share in cohort.shares
    ]
    return cohort._replace(shares=shares)


def _blend_cohort(cohort: Cohort, *, buffers: bool) -> None:
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
    """Compute `shadow <- shadow + gain * (live - shadow)` in place; a gain of 1 copies exactly.

    Args:
        shadows: tensors of one device and dtype; of any if the gain is 1.
        lives: tensors of the same shapes, also of one device and dtype.
        gain: 1 - beta.
        taken: whether the shadows change. A bool tensor is read on its device, and the host does not wait for it.
        maybe_broken: whether `lives` may hold NaN or infinity when `taken` is false, as buffers may.
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
    """Blend with a gain of 0 if `taken` is false. Foreach functions take no gain that is on the device."""
    weights: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    for shadow, live in zip(shadows, lives, strict=True):
        # As on the host, the gain is not rounded to the dtype of a low-precision shadow.
        wide = torch.promote_types(shadow.dtype, torch.float32)
        weight = weights.get((shadow.device, wide))
        if weight is None:  # one for all tensors: each costs an accelerator two more calls
            weight = weights[shadow.device, wide] = taken.to(shadow.device, wide) * gain
        if wide == shadow.dtype:
            shadow.lerp_(live, weight)
        else:
            shadow.copy_(torch.lerp(shadow.to(wide), live.to(wide), weight))
