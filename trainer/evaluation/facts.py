"""Describe the metrics of an evaluation in `meta.json`, over the sessions of a run."""

from collections.abc import Iterable, Mapping
from typing import Any

from trainer.config.schema import Config
from trainer.errors import ConfigError
from trainer.evaluation.custom import is_higher_better
from trainer.evaluation.evaluation import Evaluation
from trainer.protocols import JudgesSets

EVAL_SETS = "eval_sets"
"""Entry of `meta.json`: number of samples of each further evaluation set."""


def metric_facts(evaluation: Evaluation) -> dict[str, Any]:
    """Return the entries of `meta.json` that describe the metrics: the primary one, directions, units, sample count."""
    task, own = evaluation.task, evaluation.metrics
    rising = [name for name, metric in own.items() if metric.higher_is_better]
    undeclared = [name for name, metric in own.items() if metric.higher_is_better is None]
    biased = task.biased if isinstance(task, JudgesSets) else ()
    units = {**task.metric_units, **{name: metric.unit for name, metric in own.items() if metric.unit}}
    sizes = {name: further.num_samples for name, further in evaluation.sets.items()}
    return {
        "primary_metric": task.primary_metric,
        "higher_is_better": sorted(_in_every_set([*task.higher_is_better, *rising], evaluation)),
        "direction_undeclared": sorted(_in_every_set([*biased, *undeclared], evaluation)),
        "metric_units": units | {f"{own}/{name}": unit for own in sizes for name, unit in units.items()},
        "num_samples": evaluation.num_samples,
        **({} if evaluation.split_samples is None else {"split_samples": evaluation.split_samples}),
        **({EVAL_SETS: sizes} if sizes else {}),
    }


def refuse_without_direction(config: Config, evaluation: Evaluation) -> None:
    """Refuse settings by which a run acts on the average that is the best, if its primary metric has no direction.

    Raises:
        ConfigError: There is such a setting; names it.
    """
    metric, own = evaluation.task.primary_metric, evaluation.metrics
    if is_higher_better(metric, evaluation.task, own) is not None:
        return
    hint = f"; set metrics.{metric}.higher_is_better" if metric in own else ""
    for key, is_set, expected in (
        ("trainer.eval_policy", evaluation.race is not None, "full"),
        ("ema.axis", config.ema.axis > 0, "0"),
    ):
        if is_set:
            raise ConfigError(
                f"{key}: expected {expected}, because the primary metric {metric} has no direction by which an average"
                f" is the best{hint}"
            )


def _in_every_set(metrics: Iterable[str], evaluation: Evaluation) -> list[str]:
    """Return the names of metrics as they are for the primary set, then with the name of each further set."""
    names = list(metrics)
    return names + [f"{further}/{name}" for further in evaluation.sets for name in names]


def all_metric_facts(before: Mapping[str, Any], evaluation: Evaluation) -> dict[str, Any]:
    """Merge the `metric_facts` of this session into those of earlier sessions of a resumed run.

    A metric that only earlier sessions had keeps its entries.

    Args:
        before: `meta.json` as earlier sessions wrote it.
        evaluation: evaluation of this session; its declarations replace earlier ones.
    """
    facts = metric_facts(evaluation)
    # A metric in neither list has the direction "lower". So earlier entries of a metric of this session are removed.
    now = {
        *_in_every_set(evaluation.metrics, evaluation),
        *facts["higher_is_better"],
        *facts["direction_undeclared"],
        *facts["metric_units"],
    }

    for key in ("higher_is_better", "direction_undeclared"):
        if isinstance(before.get(key), list):
            facts[key] = sorted([*facts[key], *(name for name in before[key] if name not in now)])
    if isinstance(units := before.get("metric_units"), dict):
        earlier = {name: unit for name, unit in units.items() if name not in now}
        facts["metric_units"] = earlier | facts["metric_units"]
    if isinstance(sizes := before.get(EVAL_SETS), dict):
        facts[EVAL_SETS] = sizes | facts.get(EVAL_SETS, {})
    return facts
