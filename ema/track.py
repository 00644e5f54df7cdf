"""What one average consists of: its shadow, its counters, and the rules of what changes them.

The attributes of `Track` are public inside `ema`. Users work with `ExponentialMovingAverage` (ema/average.py).
"""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ema import rules
from ema.config import EMAConfig
from ema.coverage import cover
from ema.kinds import kind_of, refuse_form, refuse_kind
from ema.layout import Lane, make_lane, make_layout
from ema.memory import is_dtensor, is_part, local, overlapping
from ema.shards import assign, gather, home, moved, new_shadow, same_layout
from ema.state import (
    COUNTERS,
    RULE,
    SINCE_ORIGIN,
    UNKNOWN,
    Counters,
    match,
    raise_for_names,
    read_rule,
    rule_tensor,
    warn_of_changes,
)
from ema.walk import Walk, is_in_use

Taken = bool | Tensor
"""Whether the optimizer took the step: a bool, or a scalar bool tensor on a device for which the host must not wait."""
Saved = tuple[dict[str, Tensor], Counters, bool]
"""A checked saved average: tensors by slot name, counters, and `Track.since_origin`."""


class Track:
    """One average of the tensors of a walk. Several averages may share a walk.

    Attributes:
        walk: the live tensors.
        config, rule: as for `ExponentialMovingAverage`.
        counters: counts of updates and skips, first and last iteration, without `misses`.
        misses: int64 [2] on the device: skipped steps and skipped updates that only the device has counted; or None.
        since_origin: whether the average has had its rule since its origin; False if a loaded state had another one.
        coverage: which tensors are averaged and which are copied.
        names: all names of each slot of the walk, by slot name.
        optional: names of copied buffers that were None when the average was made.
        shadows: the average itself, by slot name.
        lane: the shadows in the order of the walk's layout; None if the next update must make it.
        is_undated: whether a loaded state had no counters, and no update was due since.
        torn: whether an update failed after it may have changed some shadows and not others.
    """

    def __init__(self, walk: Walk, config: EMAConfig, rule: rules.Rule | None) -> None:
        config = copy.deepcopy(EMAConfig.of(config))  # later changes of the user's object have no effect
        config.validate()
        rule_tensor(config)  # refuses a rule that could not be saved
        if config.rule is not None and rule is None:
            raise ValueError(
                f"EMAConfig.rule: expected the callable as rule= together with the name {config.rule!r}, got None"
            )
        self.walk = walk
        self.config = config
        self.rule = rule
        self.counters = Counters()
        self.since_origin = True
        self.is_undated = False
        self.misses: Tensor | None = None
        self.lane: Lane | None = None
        self.torn = False
        walk.refuse_swapped("make an average")
        self.coverage = cover(walk, config)
        self.names = {slot.name: list(slot.names) for slot in walk.slots()}
        self.optional = walk.absent.keys() & self.coverage.copied_buffers
        self.shadows: dict[str, Tensor] = {}
        averaged = [*self.coverage.averaged, *self.coverage.averaged_buffers]
        self._refuse_shared_elements(averaged)
        # Tensors that are made in inference mode cannot be updated outside it.
        with torch.inference_mode(False), torch.no_grad():
            for name in averaged:
                self._start_shadow(name, averaged=True)
            for name in (*self.coverage.copied, *self.coverage.copied_buffers):
                if name in walk.by_name:
                    self._start_shadow(name, averaged=False)

    def _start_shadow(self, name: str, *, averaged: bool) -> None:
        live = self.walk.by_name[name].tensor
        refuse_kind(name, live, self.config, averaged=averaged)
        self.shadows[name] = new_shadow(name, live, self.config, averaged=averaged)

    def _refuse_shared_elements(self, averaged: list[str]) -> None:
        for pair in overlapping({slot.name: slot.tensor for slot in self.walk.slots()}):
            if not set(pair).isdisjoint(averaged):
                raise ValueError(
                    f"{pair[0]!r} and {pair[1]!r} share a part of their memory: expected separate tensors,"
                    " or two names of one whole tensor"
                )

    def __getstate__(self) -> dict[str, Any]:
        # A pickle does not keep the shared memory of views, and would hold all of it for each of them. So the copy has
        # tensors of their own, and makes its own lane.
        self.walk.background.wait()
        shadows = {
            name: shadow.clone() if is_part(shadow) else shadow for name, shadow in self.shadows.items()
        }
        return {**self.__dict__, "lane": None, "shadows": shadows}

    @property
    def started(self) -> bool:
        """Whether the average has started; before that, the live weights are used in its place."""
        return self.counters.started

    @property
    def decay(self) -> float:
        """Decay of the latest due update; 0 if there was none, or if its iteration is unknown."""
        t = self.last_due()
        return 1 - rules.gain(self.config, t, self.rule) if t > 0 else 0.0

    def _keeps_newest(self) -> bool:
        """Return whether the settings ask for the newest weights at each update: a decay of 0."""
        return self.rule is None and "decay" in rules.settings_of(self.config.type) and self.config.decay == 0

    def refuse_torn(self) -> None:
        """Raise a RuntimeError if an update failed midway and no state was loaded since.

        The error of a background job that has not been raised yet is raised instead.
        """
        if self.torn:
            self.walk.background.wait()
            raise RuntimeError(
                "an update of this average failed midway, so only some of its tensors have changed: load a saved state,"
                " or make the average again"
            )

    def last_due(self) -> int:
        """Return the iterations from the start to the latest due update; 0 if there was none or it is unknown."""
        counters = self.counters
        if not counters.started or UNKNOWN in (counters.init_iteration, counters.last_iteration):
            return 0
        t = counters.last_iteration - counters.init_iteration
        return t - t % self.config.update_every

    def exact_counters(self) -> Counters:
        """Return the counters with `misses` included, for which the host waits for the device."""
        counters = self.counters
        skipped, updates = (0, 0) if self.misses is None else self.misses.tolist()
        return Counters(
            counters.started,
            counters.num_updates - updates,
            counters.num_skipped + skipped,
            counters.init_iteration,
            counters.last_iteration,
        )

    def gain_at(self, iteration: int, taken: Taken) -> tuple[float, Taken] | None:
        """Return 1 - beta of this iteration and whether the step was taken; None if the shadow does not change."""
        counters, config = self.counters, self.config
        if not counters.started:
            # The start copies the live weights even if the optimizer skipped the step.
            return (1.0, True) if iteration >= config.start_iter else None
        t = iteration - self._origin(iteration)
        if taken is False or t % config.update_every:
            return None
        gain = rules.gain(config, t, self.rule)
        if self.is_undated and gain == 1 and not self._keeps_newest():
            warnings.warn(
                "the loaded average had no counters, so it counts as new: this update replaces it by the live weights;"
                f" expected an iteration that follows the saved one, got {iteration}",
                stacklevel=6,
            )
        return gain, taken

    def count(self, iteration: int, absorbed: Taken | None, taken: Taken) -> None:
        """Count one iteration.

        Args:
            iteration: its number.
            absorbed: whether the update changed the shadow; None if no update was due.
            taken: whether the optimizer took the step.
        """
        counters = self.counters
        if not counters.started and iteration < self.config.start_iter:
            counters.last_iteration = iteration
            return
        if isinstance(taken, Tensor):
            miss = (~taken).to(torch.int64)
            pair = torch.stack([miss, miss if isinstance(absorbed, Tensor) else torch.zeros_like(miss)])
            self.misses = pair if self.misses is None else self.misses.add_(pair)
        elif not taken:
            counters.num_skipped += 1
        if counters.started and counters.init_iteration == UNKNOWN:  # also if no update is due
            counters.init_iteration = self._origin(iteration)
        if absorbed is not None:
            self.is_undated = False
            if not counters.started:
                counters.started, counters.init_iteration = True, iteration
            counters.num_updates += 1
        counters.last_iteration = iteration

    def _origin(self, iteration: int) -> int:
        """Return the iteration of the start, or the latest possible one if a loaded state does not contain it."""
        known_start = self.counters.init_iteration
        return known_start if known_start != UNKNOWN else min(self.config.start_iter, iteration - 1)

    def _lane_holds(self) -> bool:
        return self.lane is not None and self.lane.layout in self.walk.layouts.values()

    def current_lane(self) -> Lane:
        """Return the shadows in the order of the walk's layout; make both if `check_update` found another model."""
        if self.lane is None:
            self.walk.background.wait()
            self._follow_copies()
            self._follow_device()
            self.lane = self._new_lane()
        return self.lane

    def check_update(self) -> None:
        """Check that the live tensors can be averaged. Errors as `ExponentialMovingAverage.update`."""
        if not self._lane_holds():
            self.fit()
            self.lane = None
        for name in self.coverage.frozen:
            slot = self.walk.by_name.get(name)
            if slot is not None and slot.tensor.requires_grad:
                raise ValueError(
                    f"{name!r} was frozen when the average was made and is trained now: expected track_frozen=True"
                )

    def check_read(self) -> None:
        """Check that the live tensors match the shadow, unless they are those of the last update."""
        lane = self.lane if self._lane_holds() else None
        if lane is None or lane.layout.fitting_lives() is None:
            self.fit()

    def _new_lane(self) -> Lane:
        layouts, config = self.walk.layouts, self.config
        copied = {*self.coverage.copied, *self.coverage.copied_buffers}
        # If the model has changed its memory format, later averages of the same tensors have other strides.
        parts = [local(shadow) for shadow in self.shadows.values()]
        strides = tuple(part.stride() for part in parts if part.layout is torch.strided)
        key = (self.coverage, config.dtype, config.mode, config.device, config.overlap, strides)
        if key not in layouts:
            staged = config.device == "cpu"
            layouts[key] = make_layout(
                self.walk, self.shadows, copied, staged=staged, overlap=config.overlap and not staged
            )
        return make_lane(layouts[key], self.shadows, copied)

    def fit(self) -> None:
        """Check that the live tensors match the shadow; nothing changes. Copied buffers may have any shape."""
        by_name, copies = self.walk.by_name, set(self.coverage.copied_buffers)
        known_names = copies.union(*self.names.values())
        raise_for_names(
            missing=[
                name
                for name in self.shadows
                if name not in by_name and not (name in copies and name in self.walk.absent)
            ],
            unexpected=[name for name in by_name if name not in known_names],
            where="the model",
        )
        for name in by_name.keys() & copies:
            if name in self.walk.params:
                raise ValueError(f"{name!r} was a buffer and is a parameter now: make a new average")
            refuse_form(name, by_name[name].tensor, self.config, averaged=False)
        for name, shadow in self.shadows.items():
            if name not in by_name:
                continue
            live, names = by_name[name].tensor, self.names[name]
            if len(names) > 1 and any(by_name.get(other) is not by_name[name] for other in names):
                raise ValueError(f"{names} were tied when the average was made and are not any more")
            if name in copies:
                continue
            refuse_form(name, live, self.config, averaged=name not in self.coverage.copied)
            if by_name[name].name != name:
                raise ValueError(f"{by_name[name].names} are tied and were not when the average was made")
            if live.shape != shadow.shape:
                raise ValueError(f"{name!r}: expected shape {tuple(shadow.shape)}, got {tuple(live.shape)}")
            if kind_of(live) != kind_of(shadow):
                raise ValueError(f"{name!r}: expected a tensor like {shadow.dtype}, got {live.dtype}")
            whole = not is_dtensor(shadow) and self.config.mode == "full_tensor"
            if not whole and not same_layout(shadow, live):
                raise ValueError(
                    f"{name!r}: expected the sharding that the model had when the average was made"
                )

    def copies_differ(self) -> bool:
        """Return whether `_follow_copies` would make or drop a shadow. May be called at each update."""
        if self._lane_holds():
            return False
        by_name, shadows = self.walk.by_name, self.shadows
        for name in self._copies():
            live, shadow = by_name.get(name), shadows.get(name)
            if live is None or shadow is None:
                if live is not None or shadow is not None:
                    return True
            elif (shadow.shape, shadow.dtype) != (live.tensor.shape, live.tensor.dtype):
                return True
        return False

    def _follow_device(self) -> None:
        """Move the shadow if the model changed its device."""
        for name, shadow in self.shadows.items():
            slot = self.walk.by_name.get(name)
            if slot is not None and local(shadow).device != home(slot.tensor, self.config):
                self.shadows[name] = moved(shadow, home(slot.tensor, self.config))
                self.lane = None

    def _follow_copies(self) -> None:
        """Make the shadows of copied buffers again that have another shape or dtype now, or are None now."""
        for name in self.coverage.copied_buffers:
            slot, shadow = self.walk.by_name.get(name), self.shadows.get(name)
            if slot is None or slot.name != name:
                self._drop(name)
            elif shadow is None or (shadow.shape, shadow.dtype) != (slot.tensor.shape, slot.tensor.dtype):
                self._start_shadow(name, averaged=False)
                self.lane = None
            if slot is not None and slot.name in self.shadows:
                self.names[slot.name] = list(slot.names)

    def _replace_copy(self, name: str, value: Tensor) -> None:
        """Make `value` the shadow of a copied buffer; collectives: an all-gather if it is sharded."""
        old = self.shadows.get(name, next(iter(self.shadows.values())))
        with torch.inference_mode(False):
            self.shadows[name] = gather(value).to(local(old).device, copy=True)
        self.names.setdefault(name, [name])
        self.lane = None

    def _drop(self, name: str) -> None:
        if self.shadows.pop(name, None) is not None:
            self.lane = None

    def _copies(self) -> list[str]:
        """Return the names of copied buffers, tied ones under their first name."""
        others = {other for name in self.shadows for other in self.names[name] if other != name}
        return [name for name in self.coverage.copied_buffers if name not in others]

    def published(self) -> dict[str, Tensor | None]:
        """Return the value of each tensor that the average decides, by slot name; None for a buffer that is None."""
        self.refuse_torn()
        return {**dict.fromkeys(self._copies()), **self.shadows} if self.started else {}

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """Return the saved form; see `ExponentialMovingAverage.state_dict`."""
        self.walk.background.wait()
        self.refuse_torn()
        if not self.started and not is_in_use(self):
            with torch.inference_mode(False):  # what is made in it cannot be updated outside
                self._follow_live()
        state = {name: shadow for slot, shadow in self.shadows.items() for name in self.names[slot]}
        state[COUNTERS] = self.exact_counters().to_tensor()
        state[RULE] = rule_tensor(self.config, since_origin=self.since_origin)
        return state

    def _follow_live(self) -> None:
        """Copy the live weights into the shadow, except where that needs a collective."""
        with self.walk.kept_on_error():
            self.walk.refresh()
            self.fit()
        self._follow_copies()
        self._follow_device()
        for name, shadow in self.shadows.items():
            live = self.walk.by_name[name].tensor
            if same_layout(shadow, live):
                assign(shadow, live)

    def check(self, state: Mapping[str, Any]) -> Saved:
        """Check that a saved state fits this average; nothing changes. Errors and warnings as `load_state_dict`."""
        if is_in_use(self):
            raise RuntimeError("cannot load an average while it is swapped into a model")
        found = match(state, self.shadows, self.names, self._copies(), self.optional, self.walk)
        counters = Counters.from_tensor(state[COUNTERS]) if COUNTERS in state else Counters(started=True)
        fields = read_rule(state[RULE]) if RULE in state else {SINCE_ORIGIN: False}
        changed = warn_of_changes(fields, self.config)
        return found, counters, not counters.started or (fields.get(SINCE_ORIGIN, True) and not changed)

    @torch.no_grad()
    def load(self, saved: Saved) -> None:
        """Load the saved average that `check` returned."""
        self.walk.background.wait()
        found, counters, since_origin = saved
        for name, value in found.items():
            shadow = self.shadows.get(name)
            if name in self.coverage.copied_buffers and (
                shadow is None or (shadow.shape, shadow.dtype) != (value.shape, value.dtype)
            ):
                self._replace_copy(name, value.detach())
            else:
                assign(self.shadows[name], value.detach())
        for name in self.optional - found.keys():
            self._drop(name)
        self.counters, self.since_origin, self.misses, self.torn = counters, since_origin, None, False
        self.is_undated = counters.started and counters.init_iteration == UNKNOWN
