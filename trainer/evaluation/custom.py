"""Load the user's own metrics from the configuration, and compute them together with the metrics of the task.

    metrics:
      confidence:                        # logged as eval/live/confidence, eval/ema/<name>/confidence, eval/gap/...
        _target_: my_metrics.confidence  # def confidence(model, batch, random) -> Tensor [samples]
        unit: probability                # optional
        higher_is_better: true           # or false; without it this metric has no winner

Any other key is an argument of the function.

The function returns one value per sample, so that live weights and averages are compared on the same samples, as for
every other metric.
"""

import copy
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trainer.config.targets import bind_metric
from trainer.errors import ConfigError
from trainer.protocols import Batch, JudgesSets, SampleRandom, Task

NAME = re.compile(r"[\w.+-]+(?<!_se)")
"""Pattern of a metric's name; it must not end in `_se`, which marks standard errors in the records."""
OWN_KEYS = ("unit", "higher_is_better")
"""Keys of a metric that are no arguments of its function."""


@dataclass(frozen=True)
class CustomMetric:
    """One of the user's own metrics."""

    values: Callable[[nn.Module, Batch, SampleRandom], Tensor]
    """Function with its arguments bound; it returns one value per sample, `[samples]`."""
    unit: str | None = None
    """Unit in tables and on axes; None shows no unit."""
    higher_is_better: bool | None = None
    """Whether higher values are better. With None, reports show values and gaps, but no winner."""


def load_metrics(nodes: Mapping[str, Any], allowed: Sequence[str]) -> dict[str, CustomMetric]:
    """Return the metrics of the group `metrics` by name, without calling their functions.

    Args:
        nodes: for each name, a mapping with `_target_`, `unit`, `higher_is_better` and arguments.
        allowed: prefixes that a `_target_` may start with; there are no built-in ones.

    Raises:
        ConfigError: A name, a target, a unit, a direction or an argument is not valid; the message begins with the key.
    """
    metrics = {}
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
        bound = {field: value for field, value in node.items() if field not in OWN_KEYS}
        metrics[name] = CustomMetric(bind_metric(bound, key, allowed, also=OWN_KEYS), unit, higher)
    return metrics


def _without_target(key: str, node: Mapping[str, Any]) -> str:
    below = next((name for name, value in node.items() if isinstance(value, Mapping)), None)
    if below is None:
        return f"{key}._target_: expected the dotted path of a function, got nothing"
    # Hydra reads each full stop in a key as a new level.
    name = key.removeprefix("metrics.")
    return f"{key}.{below}: expected a name without a full stop in front of _target_; call it metrics.{name}_{below}"


def is_higher_better(metric: str, task: Task, own: Mapping[str, CustomMetric]) -> bool | None:
    """Return whether higher values of a metric are better; None if it has no direction, so that no value is the best.

    `own` are the user's metrics, which may be primary too.
    """
    if metric in own:
        return own[metric].higher_is_better
    if isinstance(task, JudgesSets) and metric in task.biased:
        return None
    return metric in task.higher_is_better


def measure(
    task: Task, metrics: Mapping[str, CustomMetric], model: nn.Module, batch: Batch, random: SampleRandom
) -> dict[str, Tensor]:
    """Return the task's and the user's own metrics by name, each `[samples]`.

    Every metric of the user's own draws the same random numbers as the task, from the first one on.

    Raises:
        ConfigError: Two metrics have the same name, or one does not return one value per sample.
    """
    copies = {name: copy.copy(random) for name in metrics}
    samples = len(next(iter(batch.values())))
    values_by_name = task.metrics(model, batch, random)
    for name, values in values_by_name.items():
        any_shape = isinstance(task, JudgesSets) and name.startswith("set/")
        check_values(f"task: metric {name}", values, samples, any_shape=any_shape)
    for name, metric in metrics.items():
        refuse_taken(name, values_by_name)
        values_by_name[name] = metric.values(model, batch, copies[name])
        check_values(f"metrics.{name}", values_by_name[name], samples)
    return values_by_name


def check_values(origin: str, values: Any, samples: int, *, any_shape: bool = False) -> None:
    """Refuse values of a metric that are not one per sample, `[samples]`, or with `any_shape` `[samples, ...]`.

    Raises:
        ConfigError: They are not; the message begins with `origin`.
    """
    shape = tuple(values.shape) if isinstance(values, Tensor) else None
    if shape is None or (shape[:1] if any_shape else shape) != (samples,):
        expected = f"({samples}, ...)" if any_shape else f"({samples},)"
        got = type(values).__name__ if shape is None else shape
        raise ConfigError(f"{origin}: expected a tensor of shape {expected}, got {got}")


def refuse_taken(name: str, task_metrics: Container[str]) -> None:
    """Refuse a name of the user's own metric that a metric of the task has already.

    Raises:
        ConfigError: The task has a metric of this name.
    """
    if name in task_metrics:
        raise ConfigError(f"metrics.{name}: the task has a metric of this name; choose another name")
