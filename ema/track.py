"""What one average consists of: its shadow, its counters, and the rules of what changes them.

The attributes of `Track` are public inside `ema`. Users work with `ExponentialMovingAverage` (ema/average.py).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ema import rules
from ema.config import EMAConfig
from ema.coverage import cover
from ema.layout import Lane, make_lane, make_layout
from ema.shards import assign, home, moved, new_shadow, same_layout
from ema.state import (
    COUNTERS,
    RULE,
    UNKNOWN,
    Counters,
    match,
    raise_for_names,
    read_rule,
    rule_tensor,
    warn_of_changes,
)
from ema.swap import is_in_use, refuse_swapped
from ema.walk import Walk, is_dtensor, local

Taken = bool | Tensor
"""Whether the optimizer took the step: a bool, or a scalar bool tensor on a device for which the host must not wait."""
Saved = tuple[dict[str, Tensor], Counters, dict[str, Any]]
"""A checked saved average: tensors by slot name, counters, and the fields of its rule."""


class Track:
    """One average of the tensors of a walk. Several averages may share a walk.

    Attributes:
        walk: the live tensors.
        config, rule: as for `ExponentialMovingAverage`.
        counters: counts of updates and skips, first and last iteration, without `misses`.
        misses: int64 [2] on the device: skipped steps and skipped updates that only the device has counted; or None.
        coverage: which tensors are averaged and which are copied.
        names: all names of each slot of the walk, by slot name.
        shadows: the average itself, by slot name.
        lane: the shadows in the order of the walk's layout; None if the next update must make it.
    """

    def __init__(self, walk: Walk, config: EMAConfig, rule: rules.Rule | None) -> None:
        config.validate()
        if config.rule is not None and rule is None:
            raise ValueError(
                f"EMAConfig.rule: expected the callable as rule= together with the name {config.rule!r}, got None"
            )
        self.walk = walk
        self.config = config
        self.rule = rule
        self.counters = Counters()
        self.misses: Tensor | None = None
        self.lane: Lane | None = None
        refuse_swapped(walk, "make an average")
        self.coverage = cover(walk, config)
        self.names = {slot.name: list(slot.names) for slot in walk.slots()}
        with torch.no_grad():
            averaged = [*self.coverage.averaged, *self.coverage.averaged_buffers]
            self.shadows = {
                name: new_shadow(name, walk.by_name[name].tensor, config, averaged=True) for name in averaged
            }
            for name in self.coverage.copied:
                self.shadows[name] = new_shadow(name, walk.by_name[name].tensor, config, averaged=False)

    def __getstate__(self) -> dict[str, Any]:
        # A pickle does not keep the shared memory of views, so the copy makes its own lane.
        self.walk.background.wait()
        return {**self.__dict__, "lane": None}

    @property
    def started(self) -> bool:
        """Whether the average has started; before that, the live weights are used in its place."""
        return self.counters.started

    @property
    def decay(self) -> float:
        """Decay of the latest due update; 0 if there was none, or if its iteration is unknown."""
        t = self.last_due()
        return 1 - rules.gain(self.config, t, self.rule) if t > 0 else 0.0

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
        return rules.gain(config, t, self.rule), taken

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
        if absorbed is not None:
            if not counters.started:
                counters.started, counters.init_iteration = True, iteration
            elif counters.init_iteration == UNKNOWN:
                counters.init_iteration = self._origin(iteration)
            counters.num_updates += 1
        counters.last_iteration = iteration

    def _origin(self, iteration: int) -> int:
        """Return the iteration of the start, or the latest possible one if a loaded state does not contain it."""
        known_start = self.counters.init_iteration
        return known_start if known_start != UNKNOWN else min(self.config.start_iter, iteration - 1)

    def current_lane(self) -> Lane:
        """Return the shadows in the order of the walk's layout; make both again if the model changed."""
        walk = self.walk
        if self.lane is None or not any(self.lane.layout is layout for layout in walk.layouts.values()):
            walk.background.wait()
            self.fit()
            with torch.inference_mode(False), torch.no_grad():
                # Tensors that are made in inference mode cannot be updated outside it.
                self.lane = self._new_lane()
        for name in self.coverage.frozen:
            if walk.by_name[name].tensor.requires_grad:
                raise ValueError(
                    f"{name!r} was frozen when the average was made and is trained now: expected track_frozen=True"
                )
        return self.lane

    def _new_lane(self) -> Lane:
        layouts, config, copied = self.walk.layouts, self.config, self.coverage.copied
        key = (self.coverage, config.dtype, config.mode, config.device, config.overlap)
        if key not in layouts:
            staged = config.device == "cpu"
            layouts[key] = make_layout(
                self.walk, self.shadows, copied, staged=staged, overlap=config.overlap and not staged
            )
        return make_lane(layouts[key], self.shadows, copied)

    def fit(self) -> None:
        """Check that the live tensors match the shadow, and move the shadow if the model changed its device."""
        by_name = self.walk.by_name
        known_names = {name for names in self.names.values() for name in names}
        raise_for_names(
            missing=[name for name in self.shadows if name not in by_name],
            unexpected=[name for name in by_name if name not in known_names],
            where="the model",
        )
        for name, shadow in self.shadows.items():
            live = by_name[name].tensor
            if any(by_name.get(other) is not by_name[name] for other in self.names[name]):
                raise ValueError(
                    f"{self.names[name]} were tied when the average was made and are not any more"
                )
            if live.shape != shadow.shape:
                raise ValueError(f"{name!r}: expected shape {tuple(shadow.shape)}, got {tuple(live.shape)}")
            whole = not is_dtensor(shadow) and self.config.mode == "full_tensor"
            if not whole and not same_layout(shadow, live):
                raise ValueError(
                    f"{name!r}: expected the sharding that the model had when the average was made"
                )
            if live.is_meta:
                raise ValueError(f"{name!r}: expected a tensor with storage, got a meta tensor")
            if local(shadow).device != home(live, self.config):
                self.shadows[name] = moved(shadow, home(live, self.config))
                self.lane = None

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """Return the saved form; see `ExponentialMovingAverage.state_dict`."""
        self.walk.background.wait()
        if not self.started and not is_in_use(self):
            self._follow_live()
        state = {name: shadow for slot, shadow in self.shadows.items() for name in self.names[slot]}
        state[COUNTERS] = self.exact_counters().to_tensor()
        state[RULE] = rule_tensor(self.config)
        return state

    def _follow_live(self) -> None:
        """Copy the live weights into the shadow, except where that needs a collective."""
        self.walk.refresh()
        self.fit()
        for name, shadow in self.shadows.items():
            live = self.walk.by_name[name].tensor
            if same_layout(shadow, live):
                assign(shadow, live)

    def check(self, state: Mapping[str, Any]) -> Saved:
        """Check that a saved state fits this average; nothing changes. Errors as `load_state_dict`."""
        if is_in_use(self):
            raise RuntimeError("cannot load an average while it is swapped into a model")
        found = match(state, self.shadows, self.names, self.walk)
        counters = Counters.from_tensor(state[COUNTERS]) if COUNTERS in state else Counters(started=True)
        return found, counters, read_rule(state[RULE]) if RULE in state else {}

    @torch.no_grad()
    def load(self, saved: Saved) -> None:
        """Load the saved average that `check` returned."""
        self.walk.background.wait()
        found, self.counters, stored_rule = saved
        for name, value in found.items():
            assign(self.shadows[name], value.detach())
        self.misses = None
        warn_of_changes(stored_rule, self.config)
