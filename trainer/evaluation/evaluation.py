"""Evaluating the live weights and every average on the same batches with the same random numbers.

Because samples and noise are shared, the difference of two weights is taken sample by sample: its standard error
is that of a paired comparison, far below that of two separate means.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ema import reestimate_batchnorm
from trainer.distributed.processes import sum_over_ranks
from trainer.distributed.sharding import Network
from trainer.evaluation.custom import Metric, measure, refuse_taken
from trainer.protocols import Batch, JudgesSets, SampleRandom, Task
from trainer.rundir.keys import LIVE, evaluation_key, gap_error_key, gap_key


@dataclass(frozen=True)
class EvalBatch:
    """One forward of an evaluation; all ranks have equally many, of the same size."""

    batch: Batch
    """Samples on the device."""
    valid: Tensor
    """bool `[samples]`, False for padding."""
    positions: Tensor
    """int64 `[samples]`, place of each sample in the whole evaluation set."""
    random: SampleRandom
    """The sample's own random numbers, the same in every evaluation of the run."""


class Average(Protocol):
    """What an evaluation needs of an average, whether a run or a checkpoint holds it."""

    @property
    def started(self) -> bool:
        """Whether it holds weights of its own."""
        ...

    def swapped_into(self, model: nn.Module) -> AbstractContextManager[None]:
        """Context in which the model has its weights."""
        ...


@dataclass
class Evaluation:
    """Evaluates the live weights and every average; call it to evaluate.

    `batches` is called once per set of weights and yields the same `EvalBatch`es each time; `num_samples` counts
    the whole evaluation set over all ranks. `statistics_batches` yields training samples on which BatchNorm
    statistics of an average are re-estimated, or is None to use the copied ones.
    """

    task: Task
    batches: Callable[[], Iterable[EvalBatch]]
    num_samples: int
    statistics_batches: Callable[[], Iterable[EvalBatch]] | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """The user's own, beside the task's."""
    copies: int = 1
    """Number of ranks that see the same samples."""

    def __call__(
        self, network: Network, averages: Mapping[str, Average], *, live: bool = True
    ) -> dict[str, float]:
        """Metrics by name, as in `metrics.jsonl`: `eval/live/loss`, `eval/ema/<name>/loss`, `eval/gap/<name>/loss`.

        An average that has not started yet is left out; without `live` there are no gaps.

        Collectives: the model's own, and one all-reduce of the per-sample values per set of weights.
        """
        of_live = self.evaluate(network) if live else {}
        record = {evaluation_key(LIVE, metric): float(values.mean()) for metric, values in of_live.items()}
        for name, average in averages.items():
            if not average.started:
                continue
            with average.swapped_into(network.module):
                values = self.evaluate(network, reestimate=self.statistics_batches is not None)
            record |= {evaluation_key(name, metric): float(v.mean()) for metric, v in values.items()}
            for metric in of_live:
                gap, standard_error = paired_gap(of_live[metric], values[metric])
                record[gap_key(name, metric)] = gap
                record[gap_error_key(name, metric)] = standard_error
        return record

    def evaluate(self, network: Network, *, reestimate: bool = False) -> dict[str, Tensor]:
        """Metrics of the weights now in the model, float64 `[num_samples]` each, the same on every rank.

        Collectives: the model's own, and one all-reduce.
        """
        with evaluating(network):
            if reestimate and self.statistics_batches is not None:
                with network.autocast():
                    reestimate_batchnorm(network.module, self.statistics_batches(), forward=self._forward)
                network.sync_buffers()
            values: dict[str, Tensor] = {}
            for item in self.batches():
                with network.autocast():
                    metrics = measure(self.task, self.metrics, network.module, item.batch, item.random)
                for metric, samples in metrics.items():
                    # A sum over ranks joins the parts: each sample is valid on `copies` ranks, zero elsewhere.
                    shape = (self.num_samples, *samples.shape[1:])
                    whole = values.setdefault(
                        metric, torch.zeros(shape, dtype=torch.float64, device=samples.device)
                    )
                    mask = item.valid.to(samples.device)
                    whole[item.positions.to(samples.device)[mask]] = samples[mask].double()
        return self.of_the_set({name: whole / self.copies for name, whole in _joined(values).items()})

    def of_the_set(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the metrics of the whole set from the values per sample of `measure`; float64 on the CPU.

        Raises:
            ConfigError: a metric of the user's own has the name of one of the task's.
        """
        if not isinstance(self.task, JudgesSets):
            return values
        own = {name: values.pop(name) for name in self.metrics}
        judged = self.task.set_metrics(values)
        for name in own:
            refuse_taken(name, judged)
        return judged | own

    def _forward(self, module: nn.Module, item: EvalBatch) -> None:
        # As in training, where the statistics come from.
        self.task.losses(module, item.batch, item.random)


def _joined(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the values of all ranks on the CPU by one all-reduce."""
    joined = sum_over_ranks(torch.cat([whole.flatten() for whole in values.values()]).cpu())
    parts = joined.split([whole.numel() for whole in values.values()])
    return {name: part.view(whole.shape) for (name, whole), part in zip(values.items(), parts, strict=True)}


def metric_facts(evaluation: Evaluation) -> dict[str, Any]:
    """Return what a report needs to know about the metrics besides their values, as entries of `meta.json`."""
    task, own = evaluation.task, evaluation.metrics
    rising = [name for name, metric in own.items() if metric.higher_is_better]
    undeclared = [name for name, metric in own.items() if metric.higher_is_better is None]
    biased = task.biased if isinstance(task, JudgesSets) else ()
    return {
        "primary_metric": task.primary_metric,
        "higher_is_better": sorted([*task.higher_is_better, *rising]),
        "direction_undeclared": sorted([*biased, *undeclared]),
        "metric_units": {**task.metric_units, **{name: one.unit for name, one in own.items() if one.unit}},
        "num_samples": evaluation.num_samples,
    }


def all_metric_facts(before: Mapping[str, Any], evaluation: Evaluation) -> dict[str, Any]:
    """Merge `metric_facts` of this session with those of earlier ones, for a run that is resumed.

    A metric that this session dropped keeps its earlier entries.

    Args:
        before: `meta.json` of the sessions before.
        evaluation: of this session, whose declarations win.
    """
    facts = metric_facts(evaluation)
    # A direction that is not listed is "lower": what is declared now must leave the lists of before.
    now = {
        *evaluation.metrics,
        *facts["higher_is_better"],
        *facts["direction_undeclared"],
        *facts["metric_units"],
    }

    def kept(key: str) -> list[str]:
        listed = before.get(key)
        return [name for name in listed if name not in now] if isinstance(listed, list) else []

    units = before.get("metric_units")
    old_units = units.items() if isinstance(units, dict) else ()
    return {
        **facts,
        "higher_is_better": sorted([*kept("higher_is_better"), *facts["higher_is_better"]]),
        "direction_undeclared": sorted([*kept("direction_undeclared"), *facts["direction_undeclared"]]),
        "metric_units": {
            **{name: unit for name, unit in old_units if name not in now},
            **facts["metric_units"],
        },
    }


@contextmanager
def evaluating(network: Network) -> Iterator[None]:
    """Run forwards without a backward: eval mode, no gradients; parameters are resharded afterwards."""
    modes = [(module, module.training) for module in network.module.modules()]
    network.module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.reshard()
        for module, training in modes:
            module.training = training


def paired_gap(live: Tensor, average: Tensor) -> tuple[float, float]:
    """Mean of `live - average` over the samples and its standard error (NaN for a single sample)."""
    difference = live.double() - average.double()
    count = difference.numel()
    error = difference.std(correction=1) / count**0.5 if count > 1 else difference.new_tensor(float("nan"))
    return float(difference.mean()), float(error)
