"""One exponential moving average of a model's weights."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ema import rules, teacher
from ema.config import EMAConfig
from ema.swap import publish, swapped
from ema.track import Track
from ema.update import update_together
from ema.walk import Walk


class ExponentialMovingAverage:
    """Average weights: `shadow <- beta * shadow + (1 - beta) * live` after each optimizer step.

    The first update at or after `start_iter` copies the live weights. Parameters are averaged in `config.dtype`,
    buffers are copied in their own dtype. Names are canonical: they do not contain the names of wrappers.
    The average holds a reference to the model. Its attribute `track` is for the other modules of `ema`.

    Args:
        model: the live model, already on its device and already sharded; wrapped (compiled, DDP, ...) or not.
        config: the settings of the average; an object of another class that has the first ten fields is accepted too.
        rule: the callable of `config.rule`, `fn(t, config) -> beta`, with its arguments bound.

    Collectives: on a sharded model in mode `full_tensor` one all-gather per parameter, here and in each update.
    Otherwise none.

    Raises:
        ValueError: The config is not valid, a pattern matches nothing, or the model cannot be averaged.
    """

    def __init__(self, model: nn.Module, config: EMAConfig, *, rule: rules.Rule | None = None) -> None:
        self.track = Track(Walk(model), config, rule)

    @classmethod
    def of(cls, track: Track) -> "ExponentialMovingAverage":
        """Make an average of a track that exists already, as a bank does."""
        average = cls.__new__(cls)
        average.track = track
        return average

    def __repr__(self) -> str:
        # This must not wait for the device, so the count may include updates that the device skipped.
        rule = rules.path_of(self.config.rule) if self.config.rule else self.config.type
        counters = self.track.counters
        begun = f"num_updates={counters.num_updates}" if counters.started else "not started"
        return f"ExponentialMovingAverage({rule}, decay={self.decay:.6g}, {begun})"

    @property
    def config(self) -> EMAConfig:
        """The settings of the average."""
        return self.track.config

    @property
    def rule(self) -> rules.Rule | None:
        """The callable of `config.rule`, None for a built-in rule."""
        return self.track.rule

    @property
    def started(self) -> bool:
        """Whether the average has started; before that, the live weights are used in its place."""
        return self.track.started

    @property
    def num_updates(self) -> int:
        """Number of updates that changed the shadow, with the copy at the start. May wait for the device."""
        return self.track.exact_counters().num_updates

    @property
    def num_skipped(self) -> int:
        """Number of iterations since the start that were skipped as not finite. May wait for the device."""
        return self.track.exact_counters().num_skipped

    @property
    def last_iteration(self) -> int:
        """The iteration of the last `update`; -1 if there was none, or a loaded state does not contain it."""
        return self.track.counters.last_iteration

    @property
    def decay(self) -> float:
        """Decay (beta) of the latest due update: the product over `update_every` iterations.

        It is 0 until the first update after the start, and while the start of a loaded average is unknown.
        """
        return self.track.decay

    def update(self, model: nn.Module, *, iteration: int, finite: bool | Tensor = True) -> None:
        """Update the average with the live weights. Call it once after each optimizer step.

        Args:
            model: the live model, wrapped or not.
            iteration: the number of the step, larger at each call. Before `start_iter` the shadow does not change.
            finite: False if the optimizer skipped this step. Then the shadow does not change and the skip is counted.
                A scalar tensor is read on its device, and the host does not wait for it. In that case the live weights
                must be finite, which they are after a skipped step.

        Collectives: none in mode `local_shard`; in `full_tensor` one all-gather per sharded parameter; with
        `check_finite` on a sharded model one all-reduce of one number.

        Raises:
            ValueError: `iteration` is not larger than the last one, or a tensor changed its shape or sharding.
            KeyError: The names of the model's parameters differ from those of the average.
            RuntimeError: An average is swapped into the model. An error of the device or of a collective may leave the
                average half updated; every later call then raises a RuntimeError until `load_state_dict`.
        """
        update_together(self.track.walk, [self.track], model, iteration, finite)

    def wait(self) -> None:
        """Wait until no update runs in the background (`config.device`, `config.overlap`).

        All methods here that use the shadow wait by themselves. Optimizers of `torch.optim` wait before each step until
        the live weights have been read. A loop that changes the weights in another way must call this first.
        """
        self.track.walk.background.wait()

    @torch.no_grad()
    def copy_to(self, target: nn.Module) -> None:
        """Write the average into `target`, which may be sharded.

        Tensors that the average does not track get their live values. Before the start all of them do, with a warning.
        Values are cast to the target's dtypes. Copied buffers keep their own shape and dtype; in a target whose
        parameters have another dtype they are cast too.

        Collectives: all-gathers if the target is sharded in another way than the average; all ranks must call this.

        Raises:
            KeyError, ValueError: A tensor is missing, unexpected or of the wrong shape. The message has its name, and
                the target is unchanged.
            RuntimeError: An average is swapped into the model or the target.
        """
        track = self.track
        track.walk.refuse_swapped("copy the average")
        self.wait()
        with track.walk.kept_on_error():
            track.walk.refresh()
            track.fit()
        walk = Walk(target)
        walk.refuse_swapped("copy the average")
        if not track.started:
            self._warn_not_started("copy_to")
        by_name = track.walk.by_name
        values: dict[str, Tensor | None] = {name: slot.tensor for name, slot in by_name.items()}
        values |= dict.fromkeys(track.walk.absent)
        for first, value in track.published().items():
            names = by_name[first].names if first in by_name else track.names.get(first, [first])
            values |= dict.fromkeys(names, value)
        publish(values, walk, set(track.coverage.copied_buffers), track.walk.dtype)

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """Replace the live weights and buffers by the average inside the context.

        The average is written into the storage of the live weights, shard by shard. So a compiled forward uses it, and
        optimizer state does not change. At the end the live values are restored bit for bit, also after an exception.
        So a backward outside may follow a forward of before; it is refused inside.
        So are frozen parameters, all buffers, and what was registered, converted or merged inside. A module whose
        tensors changed inside gets its other attributes back too, except its mode.
        Before the start the live weights are kept, with a warning.

        Collectives: none. Memory: a copy of the live weights' local parts.

        Raises:
            RuntimeError: An average is swapped into the model already, or into one that shares a parameter with it.
                Inside the context `update`, `copy_to` and `load_state_dict` raise it too. At the end, a tensor could
                not be restored; the message names it, and all other tensors are restored.
            KeyError, ValueError: The model does not fit, or its tensors share memory and did not before.
        """
        track = self.track
        track.walk.refuse_swapped("swap an average in")
        self.wait()
        with ExitStack() as stack:
            with track.walk.kept_on_error():
                track.walk.follow(model, "swap an average in")
                track.fit()
                if not track.started:
                    self._warn_not_started("swapped_into")
                stack.enter_context(swapped(track, track.walk, track.published()))
            yield

    def forward(self, model: nn.Module, *args: Any, train: bool = False, **kwargs: Any) -> Any:
        """Return `model(*args, **kwargs)` computed with the weights and buffers of the average, without gradients.

        For a teacher inside the loss. May be called between a forward of the live model and its backward, whose
        gradients stay the same bit for bit. The model needs no second copy of the weights: during the call its
        parameters point at the shadow, and FSDP2 gathers the shadow's shards block by block. If the shadow has another
        dtype or device than the parameters, the weights are cast for the call, under FSDP2 one block at a time.
        Tensors that the average does not track have their live values.

        A parameter in the result is a copy of its average, except one that FSDP2 has gathered.
        The call changes neither weights nor buffers, of the live model or the average, also if it fails. So in train
        mode no running statistics change. Dropout in train mode takes random numbers from torch's generator; in eval
        mode the call takes none. Before the start the live weights are used, with a warning after the first update.

        Args:
            model: the live model, wrapped or not. DDP is left out, because the call needs no gradients.
            *args: positional arguments of the model.
            train: whether the call runs in train mode. Afterwards each module has its own mode again.
            **kwargs: keyword arguments of the model.

        Collectives: those of the model's forward; under FSDP2 parameters that were left gathered are gathered again.

        Raises:
            RuntimeError: An average is swapped into the model. Or the forward has written into its parameters, as some
                layers do in train mode; then it has changed the average too.
            KeyError, ValueError: The model does not fit.
        """
        track = self.track
        track.walk.refuse_swapped("run an average")
        self.wait()
        with track.walk.kept_on_error():
            track.walk.follow(model, "run an average")
            track.check_read()
        if not track.started and self.last_iteration >= 0:
            self._warn_not_started("forward", stacklevel=3)
        return teacher.run(
            model, args, kwargs, walk=track.walk, values=track.published(), train=train, average=track
        )

    @torch.no_grad()
    def state_dict(self, *, snapshot: bool = False) -> dict[str, Tensor]:
        """Return the average as a flat dict of tensors by canonical name; tied tensors are under each of their names.

        Two reserved keys hold the counters and the rule (`ema.state`). Sharded shadows are DTensors.

        The tensors share the memory of the shadow. So DCP can load into them; call `load_state_dict` afterwards. Small
        tensors are views into one larger storage: `torch.save` of a single one also saves the others of its storage.

        Args:
            snapshot: whether to clone the tensors, so that they can be saved while training continues.

        Collectives: none.
        """
        state = self.track.state()
        return {name: tensor.clone() for name, tensor in state.items()} if snapshot else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved average. All names must match, and a load that fails changes nothing.

        Accepts what `state_dict` returned, whole or sharded in any way. Also accepts a plain dict of names and tensors,
        such as Model-Optimizer's class saves: that average counts as started, at an unknown iteration. Its first update
        warns if it replaces all of it, as `power` does at iteration 1. Warns if the saved rule differs from the one of
        the config.

        Collectives: all-gathers of values that are sharded in another way than the shadow; all ranks must call this.

        Raises:
            KeyError: Keys are missing, unexpected or ambiguous; the message lists them.
            ValueError: A value has the wrong shape or kind; the message has its key.
            RuntimeError: The average is swapped into a model.
        """
        self.track.load(self.track.check(state))

    def _warn_not_started(self, action: str, stacklevel: int = 4) -> None:
        warnings.warn(
            f"{action}: the average has not started (start_iter={self.config.start_iter}); live weights are used",
            stacklevel=stacklevel,
        )
