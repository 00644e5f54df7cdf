"""The first forward of a run, which shows before any file is written whether its parts fit together."""

import re
from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any

from torch import Tensor

from trainer.config.eval_sets import KEY as EVAL_SETS
from trainer.distributed.sharding import Network
from trainer.errors import ConfigError, below, listed
from trainer.evaluation.custom import measure
from trainer.evaluation.evaluation import EvalBatch, Evaluation, evaluating
from trainer.loop.misfits import PARTS, fitting
from trainer.protocols import Batch, JudgesSets, Task

DECLARATIONS = ("higher_is_better", "biased")
"""Attributes of a task that name metrics."""


def try_forwards(network: Network, evaluation: Evaluation) -> tuple[Batch, list[str], list[str]]:
    """Refuse a model, task, data and metrics that do not fit together.

    Faults by which a verdict would be wrong are refused for every run, also when it is resumed or evaluated; a word or
    the user's own task mends them. With those of the primary metric there is no verdict at all, and a run of an earlier
    version may have them, so they are left to the caller: it refuses a new run, and warns of an old one.

    Returns:
        The first batch, warnings, and the faults of the primary metric.

    Raises:
        ConfigError: The forward fails, and the message includes that of the model or the task; or what the task
            declares about its metrics does not fit them.

    Collectives: those of a forward for each evaluation set.
    """
    _check_declarations(evaluation.task)
    first = next(iter(evaluation.batches()))
    names = _try_forward(network, evaluation, first)
    faults = _primary_faults(evaluation.task, names)
    for name, own in evaluation.sets.items():
        with below(f"{EVAL_SETS}.{name}"):
            found = _try_forward(network, own, next(iter(own.batches())))
        faults += [f"{EVAL_SETS}.{name}: {fault}" for fault in _primary_faults(own.task, found)]
    warnings = []
    for attribute in DECLARATIONS:
        declared = getattr(evaluation.task, attribute, ())
        if unknown := listed([name for name in declared if name not in names]):
            expected = f"expected names of {', '.join(names)}"
            warnings.append(f"task.{attribute}: {unknown}: no such metric; {expected}")
    return first.batch, warnings, faults


def refuse_typed(faults: Sequence[str], overrides: Sequence[str]) -> None:
    """Refuse faults of the primary metric where this command line chooses the task or the metric.

    Raises:
        ConfigError: It does, and there are faults.
    """
    if faults and any(re.match(r"[+~]*task(\.primary_metric)?=", typed) for typed in overrides):
        raise ConfigError(faults[0])


def _check_declarations(task: Task) -> None:
    """Refuse what a task declares about its metrics if it would be read as something else, or not at all."""
    for attribute in DECLARATIONS:
        names = getattr(task, attribute, ())
        # A text has the letters of ("accuracy") as names, and a mapping its keys, whatever it says of them.
        if not isinstance(names, list | tuple | Set) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"task.{attribute}: expected a list of names of metrics, got {names!r}")
    if hasattr(task, "set_metrics") and not isinstance(task, JudgesSets):
        raise ConfigError("task.biased: expected names of metrics, or [], because the task has set_metrics")


def _try_forward(network: Network, evaluation: Evaluation, item: EvalBatch) -> Collection[str]:
    """Return the names of the metrics."""
    keys = [*PARTS, *(f"metrics.{name}" for name in evaluation.metrics)]
    with fitting(keys, any_error=True, given=_described(item.batch)):
        with evaluating(network), network.autocast():
            losses = evaluation.losses(network)(network.module, item.batch, item.random)
            values = measure(evaluation.task, evaluation.metrics, network.module, item.batch, item.random)
        _refuse_none("metrics", values)
        found = evaluation.of_the_set({name: value.double().cpu() for name, value in values.items()})
        _refuse_none("set_metrics", found)
        for rule in (evaluation.race, evaluation.enough):
            if rule is not None:
                rule.refuse_without(values)
    if losses.shape != item.valid.shape:
        raise ConfigError(
            f"task._target_: expected one loss per sample, shape {tuple(item.valid.shape)},"
            f" got {tuple(losses.shape)}"
        )
    return found


def check_batch(batch: Any, samples: int) -> None:
    """Refuse what a data set gave for so many samples if it is no `Batch` of them.

    Raises:
        ConfigError: It is none; names the field.
    """
    if not isinstance(batch, Mapping) or not batch:
        got = "no field" if isinstance(batch, Mapping) else type(batch).__name__
        raise ConfigError(f"data: expected a batch of named tensors, got {got}")
    for name, own in batch.items():
        if not isinstance(own, Tensor) or own.shape[:1] != (samples,):
            got = f"of shape {list(own.shape)}" if isinstance(own, Tensor) else f"as {type(own).__name__}"
            raise ConfigError(
                f"data: expected tensors with one row per sample, {samples} here, got {name} {got}"
            )


def _refuse_none(method: str, metrics: Collection[str]) -> None:
    if not metrics:
        raise ConfigError(f"task: expected metrics from {method}(), got none")


def _described(batch: Batch) -> str:
    """Return the fields of a batch with their dtypes and shapes, for messages."""
    fields = [
        f"{name} {str(own.dtype).removeprefix('torch.')} {list(own.shape)}" for name, own in batch.items()
    ]
    return f"the batch has {listed(fields)}"


def _primary_faults(task: Task, metrics: Collection[str]) -> list[str]:
    """Return why a primary metric that is none of these metrics, or biased, decides no comparison; [] for another."""
    biased = task.biased if isinstance(task, JudgesSets) else ()
    names = [name for name in metrics if name not in biased]
    if task.primary_metric in names:
        return []
    return [f"task.primary_metric: expected one of {', '.join(names)}, got {task.primary_metric!r}"]
