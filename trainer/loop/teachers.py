"""Give a task the averages of the run as teachers, if its `losses` takes them."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ema import EMABank
from ema.teacher import run_as_it_is
from trainer.distributed.sharding import Network
from trainer.errors import ConfigError
from trainer.protocols import Batch, SampleRandom, Task, Teacher

Losses = Callable[[nn.Module, Batch, SampleRandom], Tensor]
"""Method `losses` of a task, its teachers bound."""


class Teachers(dict[str, Teacher]):
    """Teachers by name of the average; a name that the run does not have raises a ConfigError."""

    def __missing__(self, name: str) -> Teacher:
        raise ConfigError(f"task: expected an average of the run, one of {', '.join(self)}, got {name!r}")


def takes_averages(task: Task) -> bool:
    """Return whether the task's `losses` has an argument `averages`."""
    return "averages" in inspect.signature(task.losses).parameters


def refuse_without_averages(task: Task, names: Iterable[str]) -> None:
    """Raise a ConfigError if the task needs averages and the run keeps none."""
    if takes_averages(task) and not list(names):
        raise ConfigError(
            f"ema: {type(task).__name__}.losses takes averages, and the run keeps none; choose one, as in ema=constant"
        )


def losses_of(task: Task, teachers: Teachers) -> Losses:
    """Return the training loss of the task, with the teachers if it takes them."""
    if not takes_averages(task):
        return task.losses
    return partial(task.losses, averages=teachers)  # type: ignore[call-arg]


def of_averages(bank: EMABank, network: Network) -> Teachers:
    """Return the averages of a run as teachers."""

    def teach(name: str, *args: Any, train: bool = False, **kwargs: Any) -> Any:
        with network.autocast():
            return bank[name].forward(network.module, *args, train=train, **kwargs)

    return Teachers({name: partial(teach, name) for name in bank})


def of_present_weights(names: Iterable[str], network: Network) -> Teachers:
    """Return teachers that have the weights that the model has now, for a loss that trains nothing.

    These are the weights that an evaluation has put there, or the first ones, which are those of every average too.
    """

    def teach(*args: Any, train: bool = False, **kwargs: Any) -> Any:
        with network.autocast():
            return run_as_it_is(network.module, args, kwargs, train=train)

    return Teachers(dict.fromkeys(names, teach))


def chosen(averages: Mapping[str, Teacher], name: str | None) -> Teacher:
    """Return the teacher with a name, or the only one.

    Raises:
        ConfigError: The run has no such average, or several ones and no name.
    """
    if name is not None:
        return averages[name]
    if len(averages) > 1:
        raise ConfigError(f"task.teacher: expected one of {', '.join(averages)}, got null")
    return next(iter(averages.values()))
