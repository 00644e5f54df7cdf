"""One exponential moving average of a model's weights."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ema import rules
from ema.config import EMAConfig
from ema.swap import publish, refuse_swapped, swapped
from ema.track import Track
from ema.update import update_together
from ema.walk import Walk


class ExponentialMovingAverage:
    """`shadow <- beta * shadow + (1 - beta) * live` after each optimizer step, sharded as the model is.

    The first update at or after `start_iter` copies the live weights. Parameters are averaged in `config.dtype`,
    buffers are copied in their own (integer ones exactly). Names are canonical: wrappers do not show in them.
    The average keeps the model it was made for alive. Its attribute `track` is for the other modules of `ema`.

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
        self.track = Track(Walk(model), config, rule)

    @classmethod
    def of(cls, track: Track) -> "ExponentialMovingAverage":
        """The average of a track that exists already, as those of a bank do."""
        average = cls.__new__(cls)
        average.track = track
        return average

    def __repr__(self) -> str:
        # Never waits for the device, so skipped steps may be among the updates.
        rule = self.config.rule or self.config.type
        counters = self.track.counters
        begun = f"num_updates={counters.num_updates}" if counters.started else "not started"
        return f"ExponentialMovingAverage({rule}, decay={self.decay:.6g}, {begun})"

    @property
    def config(self) -> EMAConfig:
        """What the average is."""
        return self.track.config

    @property
    def rule(self) -> rules.Rule | None:
        """The callable behind `config.rule`."""
        return self.track.rule

    @property
    def started(self) -> bool:
        """Whether the average holds weights of its own; before the start, the live weights are used."""
        return self.track.started

    @property
    def num_updates(self) -> int:
        """Updates that changed the shadow, the copy at the start included. May wait for the device."""
        return self.track.exact_counters().num_updates

    @property
    def num_skipped(self) -> int:
        """Iterations since the start whose step was not taken or not finite. May wait for the device."""
        return self.track.exact_counters().num_skipped

    @property
    def last_iteration(self) -> int:
        """The iteration of the last `update`, -1 if there was none or a loaded state lacks it."""
        return self.track.counters.last_iteration

    @property
    def decay(self) -> float:
        """Decay (beta) of the latest update that was due, compounded over `update_every`.

        0 before and at the start, and while a loaded average has no history.
        """
        return self.track.decay

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
        update_together(self.track.walk, [self.track], model, iteration, finite)

    def wait(self) -> None:
        """Let what runs in the background (`config.device`, `config.overlap`) come to its end.

        Everything here that reads or writes the shadow does so itself, and steps of `torch.optim` optimizers wait for
        what still reads the live weights. Only a loop that writes them by other means must call this before.
        """
        self.track.walk.background.wait()

    @torch.no_grad()
    def copy_to(self, target: nn.Module) -> None:
        """Write the average (for what it does not track: the live values) into `target`, sharded or not.

        Before the start these are the live weights, with a warning. Values are cast to the target's dtypes.

        Collectives: all-gathers, if this average is sharded otherwise than the target; all ranks call.

        Raises:
            KeyError, ValueError: before anything is written, naming a missing, unexpected or ill-shaped tensor.
            RuntimeError: if an average is swapped into the model or the target.
        """
        track = self.track
        refuse_swapped(track.walk, "copy the average")
        self.wait()
        track.walk.refresh()
        walk = Walk(target)
        refuse_swapped(walk, "copy the average")
        if not track.started:
            self._warn_not_started("copy_to")
        chosen = track.shadows if track.started else {}
        values = {name: chosen.get(slot.name, slot.tensor) for name, slot in track.walk.by_name.items()}
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
        track = self.track
        refuse_swapped(track.walk, "swap an average in")
        self.wait()
        track.walk.retarget(model)
        track.walk.refresh()
        track.fit()
        if not track.started:
            self._warn_not_started("swapped_into")
        with swapped(track, track.walk, track.shadows if track.started else {}):
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
        state = self.track.state()
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
        self.track.load(self.track.check(state))

    def _warn_not_started(self, action: str) -> None:
        warnings.warn(
            f"{action}: the average has not started (start_iter={self.config.start_iter}); live weights are used",
            stacklevel=4,
        )
