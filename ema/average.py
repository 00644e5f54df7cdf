"""One exponential moving average of a model's weights."""

import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ema import rules
from ema.config import EMAConfig
from ema.coverage import cover
from ema.finite import Taken, known, weights_finite
from ema.layout import Lane, make_lane, make_layout
from ema.publish import publish
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
from ema.swap import is_in_use, refuse_swapped, swapped
from ema.update import Share, absorb
from ema.walk import Walk, is_dtensor, local


class ExponentialMovingAverage:
    """`shadow <- beta * shadow + (1 - beta) * live` after each optimizer step, sharded as the model is.

    The first update at or after `start_iter` copies the live weights. Parameters are averaged in `config.dtype`,
    buffers are copied in their own (integer ones exactly). Names are canonical: wrappers do not show in them.
    The average keeps the model it was made for alive.

    Args:
        model: the live model, on its devices and sharded already; wrapped (compiled, DDP, ...) or not.
        config: what the average is.
        rule: the callable behind `config.rule`, `fn(t, config) -> beta`.

    Collectives: in mode `full_tensor` of a sharded model one all-gather per parameter, here and in each update.
    In mode `local_shard` none, and none on unsharded models.

    Raises:
        ValueError: if the config is impossible, a pattern matches nothing, or the model cannot be averaged.
    """

    def __init__(self, model: nn.Module, config: EMAConfig, *, rule: rules.Rule | None = None) -> None:
        self._attach(Walk(model), config, rule)

    @classmethod
    def _sharing(cls, walk: Walk, config: EMAConfig, rule: rules.Rule | None) -> "ExponentialMovingAverage":
        average = cls.__new__(cls)
        average._attach(walk, config, rule)
        return average

    def _attach(self, walk: Walk, config: EMAConfig, rule: rules.Rule | None) -> None:
        config.validate()
        if config.rule is not None and rule is None:
            raise ValueError(
                f"EMAConfig.rule: expected the callable as rule= beside the name {config.rule!r}, got None"
            )
        self.config = config
        self.rule = rule
        self._walk = walk
        self._counters = Counters()
        self._misses: Tensor | None = None
        self._lane: Lane | None = None
        refuse_swapped(walk, "make an average")
        self._coverage = cover(walk, config)
        self._names = {slot.name: list(slot.names) for slot in walk.slots()}
        with torch.no_grad():
            averaged = [*self._coverage.averaged, *self._coverage.averaged_buffers]
            self._shadows = {
                name: new_shadow(name, walk.by_name[name].tensor, config, averaged=True) for name in averaged
            }
            for name in self._coverage.copied:
                self._shadows[name] = new_shadow(name, walk.by_name[name].tensor, config, averaged=False)

    def __repr__(self) -> str:
        # Never waits for the device, so skipped steps may be among the updates.
        rule = self.config.rule or self.config.type
        counters = self._counters
        begun = f"num_updates={counters.num_updates}" if counters.started else "not started"
        return f"ExponentialMovingAverage({rule}, decay={self.decay:.6g}, {begun})"

    @property
    def started(self) -> bool:
        """Whether the average holds weights of its own; before the start, the live weights are used."""
        return self._counters.started

    @property
    def num_updates(self) -> int:
        """Updates that changed the shadow, the copy at the start included. May wait for the device."""
        return self._counters.num_updates - self._missed()[1]

    @property
    def num_skipped(self) -> int:
        """Iterations since the start whose step was not taken or not finite. May wait for the device."""
        return self._counters.num_skipped + self._missed()[0]

    @property
    def last_iteration(self) -> int:
        """The iteration of the last `update`, -1 if there was none or a loaded state lacks it."""
        return self._counters.last_iteration

    @property
    def decay(self) -> float:
        """Decay (beta) of the latest update that was due, compounded over `update_every`.

        0 before and at the start, and while a loaded average has no history.
        """
        counters = self._counters
        if not counters.started or UNKNOWN in (counters.init_iteration, counters.last_iteration):
            return 0.0
        t = counters.last_iteration - counters.init_iteration
        t -= t % self.config.update_every
        return 1 - rules.gain(self.config, t, self.rule) if t > 0 else 0.0

    @torch.no_grad()
    def update(self, model: nn.Module, *, iteration: int, finite: bool | Tensor = True) -> None:
        """Absorb the live weights once; call it after each optimizer step.

        Args:
            model: the live model, wrapped or not.
            iteration: the number of the step, larger at each call; before `start_iter` nothing happens.
            finite: False if the optimizer did not take this step: the shadow stays as it is, the skip is counted.
                A scalar tensor is used on its device, without waiting for its device; the live weights must be
                finite either way, as they are when the optimizer skips.

        Collectives: none in mode `local_shard`; in `full_tensor` one all-gather per sharded parameter; with
        `check_finite` on a sharded model one all-reduce of one number.

        Raises:
            ValueError: if `iteration` is not larger than the last one, or a tensor changed its shape or sharding.
            KeyError: if the model's parameters are other ones than those of the average.
            RuntimeError: inside `swapped_into`.
        """
        update_together(self._walk, [self], model, iteration, finite)

    def wait(self) -> None:
        """Let what runs in the background (`config.device`, `config.overlap`) come to its end.

        Everything here that reads or writes the shadow does so itself, and steps of `torch.optim` optimizers wait for
        what still reads the live weights. Only a loop that writes them by other means must call this before.
        """
        self._walk.background.wait()

    @torch.no_grad()
    def copy_to(self, target: nn.Module) -> None:
        """Write the average (for what it does not track: the live values) into `target`, sharded or not.

        Before the start these are the live weights, with a warning. Values are cast to the target's dtypes.

        Collectives: all-gathers, if this average is sharded otherwise than the target; all ranks call.

        Raises:
            KeyError, ValueError: before anything is written, naming a missing, unexpected or ill-shaped tensor.
            RuntimeError: if an average is swapped into the model or the target.
        """
        refuse_swapped(self._walk, "copy the average")
        self.wait()
        self._walk.refresh()
        walk = Walk(target)
        refuse_swapped(walk, "copy the average")
        if not self.started:
            self._warn_not_started("copy_to")
        chosen = self._shadows if self.started else {}
        values = {name: chosen.get(slot.name, slot.tensor) for name, slot in self._walk.by_name.items()}
        publish(values, walk)

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """Put the average in the place of the live weights and buffers while the context lasts.

        In the same storage, by shard: a compiled forward sees it, optimizer state is untouched, and the live values
        come back bit for bit, after an exception too. Before the start the live weights stay, with a warning.
        Collectives: none. Memory: a copy of the live weights' local parts.

        Raises:
            RuntimeError: if an average is swapped into the model already; so do `update` and the like inside.
        """
        refuse_swapped(self._walk, "swap an average in")
        self.wait()
        self._walk.retarget(model)
        self._walk.refresh()
        self._fit()
        if not self.started:
            self._warn_not_started("swapped_into")
        with swapped(self, self._walk, self._shadows if self.started else {}):
            yield

    @torch.no_grad()
    def state_dict(self, *, snapshot: bool = False) -> dict[str, Tensor]:
        """The average as a flat dict of tensors by canonical name, tied ones under each of their names.

        Two reserved keys hold counters and rule (`ema.state`). Sharded shadows are DTensors. The tensors are the
        shadow itself until the next update, so that DCP may load in place; `load_state_dict` must follow. Small ones
        are views into larger storages, so that `torch.save` of a single one (not of the dict) saves its neighbours.

        Args:
            snapshot: clone, so that it may be saved while training goes on.

        Collectives: none.
        """
        self.wait()
        if not self.started and not is_in_use(self):
            self._follow_live()
        state = {name: shadow for slot, shadow in self._shadows.items() for name in self._names[slot]}
        state[COUNTERS] = Counters(
            self.started,
            self.num_updates,
            self.num_skipped,
            self._counters.init_iteration,
            self.last_iteration,
        ).to_tensor()
        state[RULE] = rule_tensor(self.config)
        return {name: tensor.clone() for name, tensor in state.items()} if snapshot else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved average; strict, and a failed load changes nothing.

        Accepts its own saved form, whole or sharded in any way, and a plain dict of names and tensors such as
        Model-Optimizer's class saves: that one counts as started at an unknown iteration. Warns if the saved rule
        differs from the config's.

        Collectives: all-gathers of values that are sharded otherwise than the shadow; all ranks call.

        Raises:
            KeyError: naming missing, unexpected or ambiguous keys.
            ValueError: naming the key of a wrong shape or kind.
            RuntimeError: inside `swapped_into`.
        """
        self._take(self._checked(state))

    def _checked(self, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], Counters, dict[str, Any]]:
        if is_in_use(self):
            raise RuntimeError("cannot load an average while it is swapped into a model")
        found = match(state, self._shadows, self._names, self._walk)
        counters = Counters.from_tensor(state[COUNTERS]) if COUNTERS in state else Counters(started=True)
        return found, counters, read_rule(state[RULE]) if RULE in state else {}

    @torch.no_grad()
    def _take(self, checked: tuple[dict[str, Tensor], Counters, dict[str, Any]]) -> None:
        self.wait()
        found, self._counters, stored_rule = checked
        for name, value in found.items():
            assign(self._shadows[name], value.detach())
        self._misses = None
        warn_of_changes(stored_rule, self.config)

    def _missed(self) -> tuple[int, int]:
        if self._misses is None:
            return 0, 0
        skipped, updates = self._misses.tolist()
        return skipped, updates

    def _warn_not_started(self, action: str) -> None:
        warnings.warn(
            f"{action}: the average has not started (start_iter={self.config.start_iter}); live weights are used",
            stacklevel=4,
        )

    def _follow_live(self) -> None:
        """Let the shadow be the live weights, as far as that needs no collective."""
        self._walk.refresh()
        self._fit()
        for name, shadow in self._shadows.items():
            live = self._walk.by_name[name].tensor
            if same_layout(shadow, live):
                assign(shadow, live)

    def _fit(self) -> None:
        """Check the walk against the shadow; move the shadow where a model moved to another device."""
        by_name = self._walk.by_name
        known_names = {name for names in self._names.values() for name in names}
        raise_for_names(
            missing=[name for name in self._shadows if name not in by_name],
            unexpected=[name for name in by_name if name not in known_names],
            where="the model",
        )
        for name, shadow in self._shadows.items():
            live = by_name[name].tensor
            if any(by_name.get(other) is not by_name[name] for other in self._names[name]):
                raise ValueError(
                    f"{self._names[name]} were tied when the average was made and are not any more"
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
                self._shadows[name] = moved(shadow, home(live, self.config))
                self._lane = None

    def _current_lane(self) -> Lane:
        walk = self._walk
        if self._lane is None or not any(self._lane.layout is layout for layout in walk.layouts.values()):
            self.wait()
            self._fit()
            with torch.inference_mode(False), torch.no_grad():
                # Tensors made in inference mode could not be updated outside it.
                self._lane = self._new_lane()
        for name in self._coverage.frozen:
            if walk.by_name[name].tensor.requires_grad:
                raise ValueError(
                    f"{name!r} was frozen when the average was made and is trained now: expected track_frozen=True"
                )
        return self._lane

    def _new_lane(self) -> Lane:
        layouts, config, copied = self._walk.layouts, self.config, self._coverage.copied
        key = (self._coverage, config.dtype, config.mode, config.device, config.overlap)
        if key not in layouts:
            staged = config.device == "cpu"
            layouts[key] = make_layout(
                self._walk, self._shadows, copied, staged=staged, overlap=config.overlap and not staged
            )
        return make_lane(layouts[key], self._shadows, copied)

    def _gain_at(self, iteration: int, taken: Taken) -> tuple[float, Taken] | None:
        """1 - beta of this iteration and whether the step counts, None if it leaves the shadow as it is."""
        counters, config = self._counters, self.config
        if not counters.started:
            # The start copies the live weights, whatever became of the step.
            return (1.0, True) if iteration >= config.start_iter else None
        t = iteration - self._origin(iteration)
        if taken is False or t % config.update_every:
            return None
        return rules.gain(config, t, self.rule), taken

    def _origin(self, iteration: int) -> int:
        """The iteration of the start; without a loaded history, the latest possible one."""
        known_start = self._counters.init_iteration
        return known_start if known_start != UNKNOWN else min(self.config.start_iter, iteration - 1)

    def _count(self, iteration: int, absorbed: Taken | None, taken: Taken) -> None:
        """Count an iteration whose step was `taken` or not; `absorbed` is None if no update was due."""
        counters = self._counters
        if not counters.started and iteration < self.config.start_iter:
            counters.last_iteration = iteration
            return
        if isinstance(taken, Tensor):
            miss = (~taken).to(torch.int64)
            pair = torch.stack([miss, miss if isinstance(absorbed, Tensor) else torch.zeros_like(miss)])
            self._misses = pair if self._misses is None else self._misses.add_(pair)
        elif not taken:
            counters.num_skipped += 1
        if absorbed is not None:
            if not counters.started:
                counters.started, counters.init_iteration = True, iteration
            elif counters.init_iteration == UNKNOWN:
                counters.init_iteration = self._origin(iteration)
            counters.num_updates += 1
        counters.last_iteration = iteration


def update_together(
    walk: Walk,
    averages: Sequence[ExponentialMovingAverage],
    model: nn.Module,
    iteration: int,
    finite: bool | Tensor,
) -> None:
    """Update averages that share a walk: one look at the live weights for all. See the class's `update`."""
    iteration = operator.index(iteration)
    for average in averages:
        if iteration <= average.last_iteration:
            raise ValueError(
                f"iteration: expected more than the last one, {average.last_iteration}, got {iteration}"
            )
    taken = known(finite)
    refuse_swapped(walk, "update an average")
    walk.retarget(model)
    refuse_swapped(walk, "update an average")
    walk.refresh()
    due = [average for average in averages if average.started or iteration >= average.config.start_iter]
    clean = weights_finite(walk) if any(average.config.check_finite for average in due) else True
    for key in [key for key, layout in walk.layouts.items() if not layout.holds()]:
        del walk.layouts[key]
    shares: list[Share] = []
    plans: list[tuple[ExponentialMovingAverage, Taken | None, Taken]] = []
    for average in averages:
        step_taken = False if average.config.check_finite and not clean else taken
        plan = None if average.config.check_finite and not clean else average._gain_at(iteration, taken)
        if plan is not None:
            shares.append(Share(average._current_lane(), *plan))
        plans.append((average, plan[1] if plan is not None else None, step_taken))
    absorb(walk, shares)
    for average, absorbed, step_taken in plans:
        average._count(iteration, absorbed, step_taken)
