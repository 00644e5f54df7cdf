"""The first forward of a run, which shows before any file is written whether its parts fit together."""

from collections.abc import Iterable

from trainer.config.eval_sets import KEY as EVAL_SETS
from trainer.distributed.sharding import Network
from trainer.errors import ConfigError, below
from trainer.evaluation.custom import measure
from trainer.evaluation.evaluation import EvalBatch, Evaluation, evaluating
from trainer.loop.misfits import PARTS, fitting
from trainer.protocols import Batch, JudgesSets, Task


def try_forwards(network: Network, evaluation: Evaluation) -> Batch:
    """Refuse a model, task, data and metrics that do not fit together; return the first batch.

    Raises:
        ConfigError: The forward fails; the message includes that of the model or the task.

    Collectives: those of a forward for each evaluation set.
    """
    first = next(iter(evaluation.batches()))
    _try_forward(network, evaluation, first)
    for name, own in evaluation.sets.items():
        with below(f"{EVAL_SETS}.{name}"):
            _try_forward(network, own, next(iter(own.batches())))
    return first.batch


def _try_forward(network: Network, evaluation: Evaluation, item: EvalBatch) -> None:
    keys = [*PARTS, *(f"metrics.{name}" for name in evaluation.metrics)]
    with fitting(keys, any_error=True):
        with evaluating(network), network.autocast():
            losses = evaluation.losses(network)(network.module, item.batch, item.random)
            values = measure(evaluation.task, evaluation.metrics, network.module, item.batch, item.random)
        of_the_set = evaluation.of_the_set({name: value.double().cpu() for name, value in values.items()})
        _check_primary(evaluation.task, of_the_set)
        for rule in (evaluation.race, evaluation.enough):
            if rule is not None:
                rule.refuse_without(values)
    if losses.shape != item.valid.shape:
        raise ConfigError(
            f"task._target_: expected one loss per sample, shape {tuple(item.valid.shape)},"
            f" got {tuple(losses.shape)}"
        )


def _check_primary(task: Task, metrics: Iterable[str]) -> None:
    """Refuse a primary metric that is none of these metrics, or biased, so that it decides no comparison."""
    biased = task.biased if isinstance(task, JudgesSets) else ()
    names = [name for name in metrics if name not in biased]
    if task.primary_metric not in names:
        raise ConfigError(
            f"task.primary_metric: expected one of {', '.join(names)}, got {task.primary_metric!r}"
        )
