"""Call the user's own callbacks between two steps.

callbacks:
  probe:                        # any name
    _target_: my_probe.Probe    # a class or function that returns a `trainer.protocols.Callback`
    layers: 3                   # its arguments
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from ema import ExponentialMovingAverage
from trainer.config.targets import build_callback
from trainer.distributed.failures import is_loss
from trainer.distributed.processes import raised_together
from trainer.errors import ConfigError, message_of
from trainer.loop.fit import Run, is_due
from trainer.rundir.keys import EVALUATION

METHODS = ("after_step", "after_evaluation", "after_checkpoint", "at_end")
"""Methods of a callback, of which it needs one."""


def load_callbacks(nodes: Mapping[str, Any], allowed: Sequence[str]) -> dict[str, Any]:
    """Build the callbacks of the group `callbacks`, by name.

    Args:
        nodes: for each name, a mapping with `_target_` and arguments; null removes a callback.
        allowed: prefixes that a `_target_` may start with; there are no built-in ones.

    Raises:
        ConfigError: A callback cannot be built, has no method of a callback, or has a wrong `every`; names its key.
    """
    built = {
        name: build_callback(node, f"callbacks.{name}", allowed)
        for name, node in nodes.items()
        if node is not None
    }
    for name, callback in built.items():
        if not any(callable(getattr(callback, method, None)) for method in METHODS):
            raise ConfigError(
                f"callbacks.{name}: expected an object with a method {', '.join(METHODS[:-1])} or {METHODS[-1]},"
                f" got {type(callback).__name__}"
            )
        for method in METHODS:
            if _runs_later(getattr(callback, method, None)):
                raise ConfigError(
                    f"callbacks.{name}: {method} is a generator or a coroutine, so a call would do nothing; remove"
                    " yield or async"
                )
        every = getattr(callback, "every", 1)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(
                f"callbacks.{name}: expected a whole number of at least 1 as every, got {every!r}"
            )
    return built


def _runs_later(method: Any) -> bool:
    """Return whether a call of the method runs none of its code."""
    kinds = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    return any(is_kind(method) for is_kind in kinds)


class View:
    """Read-only view of a run (`trainer.protocols.RunView`)."""

    def __init__(self, run: Run, run_dir: Path) -> None:
        self._run, self._run_dir = run, run_dir
        self._metrics: Mapping[str, float] = MappingProxyType({})

    @property
    def step(self) -> int:
        return self._run.step

    @property
    def steps(self) -> int:
        return self._run.config.steps

    @property
    def samples(self) -> int:
        return self._run.samples

    @property
    def lr(self) -> float:
        return self._run.lr(self._run.step)

    @property
    def model(self) -> nn.Module:
        return self._run.network.module

    @property
    def averages(self) -> Mapping[str, ExponentialMovingAverage]:
        return MappingProxyType(self._run.bank)

    @property
    def metrics(self) -> Mapping[str, float]:
        return self._metrics

    @property
    def run_dir(self) -> Path:
        return self._run_dir

    def show(self, record: Mapping[str, float]) -> None:
        """Take a record as the last one."""
        self._metrics = MappingProxyType(dict(record))


class Hooks:
    """The callbacks of a run. Every rank calls the same methods in the same order."""

    def __init__(
        self,
        callbacks: Mapping[str, Any],
        view: View,
        committed: Callable[[], Sequence[tuple[int, Path]]],
    ) -> None:
        """Prepare the calls.

        Args:
            callbacks: result of `load_callbacks`.
            view: view of the run.
            committed: function that returns the checkpoints committed since its last call, the same on every rank.
        """
        self._callbacks, self._view, self._committed = callbacks, view, committed
        self._wants_checkpoints = any(
            hasattr(callback, "after_checkpoint") for callback in callbacks.values()
        )

    def after_step(self, record: Mapping[str, float]) -> None:
        """Call what is due after a step.

        Args:
            record: metrics logged at this step; empty if none were.

        Raises:
            ConfigError: A callback failed; names it.

        Collectives: those of `committed` and of the callbacks.
        """
        view = self._view
        if record:  # such a step waits for the device, and for the other ranks
            view.show(record)
            self._after_checkpoints()
        self._call("after_step", due=lambda callback: is_due(view.step, getattr(callback, "every", 1)))
        if any(key.startswith(EVALUATION) for key in record):
            self._call("after_evaluation")

    def at_end(self) -> None:
        """Report the last checkpoint and the end of the session; errors and collectives as for `after_step`."""
        self._after_checkpoints()
        self._call("at_end")

    def _after_checkpoints(self) -> None:
        if self._wants_checkpoints:
            for step, path in self._committed():
                self._call("after_checkpoint", step, path)

    def _call(self, method: str, *arguments: Any, due: Callable[[Any], bool] = lambda callback: True) -> None:
        for name, callback in self._callbacks.items():
            call = getattr(callback, method, None)
            if call is None or not due(callback):
                continue
            place = f"callbacks.{name}: {method} failed at step {self._view.step}"
            with raised_together(place):
                try:
                    call(self._view, *arguments)
                except Exception as error:
                    if is_loss(error):  # another rank has failed
                        raise
                    raise ConfigError(
                        f"{place}: {type(error).__name__}: {message_of(error)}"
                        " (HYDRA_FULL_ERROR=1 shows the traceback)"
                    ) from error
