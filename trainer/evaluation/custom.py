"""A user's own metrics: functions that the configuration names, judged beside the task's.

    metrics:
      confidence:                        # logged as eval/live/confidence, eval/ema/<name>/confidence, eval/gap/...
        _target_: my_metrics.confidence  # def confidence(model, batch, random) -> Tensor [samples]
        unit: probability                # optional
        higher_is_better: true           # or false; without it this metric names no winner

Any further key is an argument of the function.

One value per sample, so that live weights and averages are compared sample by sample like in every other metric.
"""

import copy
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trainer.config.targets import bind_metric
from trainer.errors import ConfigError
from trainer.protocols import Batch, SampleRandom, Task

NAME = re.compile(r"[\w.+-]+(?<!_se)")
"""Part of a logged name; what ends in `_se` is a standard error there."""


@dataclass(frozen=True)
class Metric:
    """One of them."""

    values: Callable[[nn.Module, Batch, SampleRandom], Tensor]
    """The function, bound to its arguments: one value per sample, `[samples]`."""
    unit: str | None = None
    """For tables and axes."""
    higher_is_better: bool | None = None
    """Its direction. With None, reports show values and gaps but name no winner."""


def load_metrics(nodes: Mapping[str, Any], allowed: Sequence[str]) -> dict[str, Metric]:
    """The metrics of `metrics`, by name; nothing is called yet.

    Args:
        nodes: name -> `_target_`, `unit`, `higher_is_better` and arguments.
        allowed: prefixes that a `_target_` may start with; there are no built-in ones.

    Raises:
        ConfigError: naming the key.
    """
    found = {}
    for name, node in nodes.items():
        key = f"metrics.{name}"
        if not NAME.fullmatch(name):
            raise ConfigError(f"{key}: expected a name of letters, digits, _, ., + and -, not ending in _se")
        if not isinstance(node, Mapping):
            raise ConfigError(f"{key}: expected _target_ and its arguments, got {node!r}")
        if "_target_" not in node:
            raise ConfigError(_without_target(key, node))
        unit, higher = node.get("unit"), node.get("higher_is_better")
        if not isinstance(unit, str | None):
            raise ConfigError(f"{key}.unit: expected text, got {unit!r}")
        if not isinstance(higher, bool | None):
            raise ConfigError(f"{key}.higher_is_better: expected true or false, got {higher!r}")
        bound = {field: value for field, value in node.items() if field not in ("unit", "higher_is_better")}
        found[name] = Metric(bind_metric(bound, key, allowed), unit, higher)
    return found


def _without_target(key: str, node: Mapping[str, Any]) -> str:
    below = next((name for name, value in node.items() if isinstance(value, Mapping)), None)
    if below is None:
        return f"{key}._target_: expected the dotted path of a function, got nothing"
    # Hydra reads the full stops of a key as levels.
    name = key.removeprefix("metrics.")
    return f"{key}.{below}: expected a name without a full stop in front of _target_; call it metrics.{name}_{below}"


def measure(
    task: Task, metrics: Mapping[str, Metric], model: nn.Module, batch: Batch, random: SampleRandom
) -> dict[str, Tensor]:
    """The task's metrics and the user's own, each `[samples]`; each draws the same random numbers from the first on.

    Raises:
        ConfigError: two have one name, or one does not answer with a value per sample.
    """
    fresh = {name: copy.copy(random) for name in metrics}
    found = task.metrics(model, batch, random)
    for name, metric in metrics.items():
        refuse_taken(name, found)
        values = metric.values(model, batch, fresh[name])
        samples = next(iter(batch.values())).shape[:1]
        if not isinstance(values, Tensor) or values.shape != samples:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ConfigError(f"metrics.{name}: expected a tensor of shape {tuple(samples)}, got {got}")
        found[name] = values
    return found


def refuse_taken(name: str, judged: Container[str]) -> None:
    """Refuse a metric of the user's own whose name is one of the task's metrics.

    Raises:
        ConfigError: it is.
    """
    if name in judged:
        raise ConfigError(f"metrics.{name}: the task has a metric of this name; choose another")
