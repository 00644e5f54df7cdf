"""Evaluate the live weights and every average on the same batches with the same random numbers.

The gap between live weights and an average is computed sample by sample. Because both see the same samples and the same
noise, its standard error is that of a paired difference, far below that of the difference of two separate means.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ema import EMAConfig, reestimate_batchnorm
from ema.names import named_modules
from trainer.distributed.processes import sum_over_ranks
from trainer.distributed.sharding import Network
from trainer.evaluation.custom import CustomMetric, measure, refuse_taken
from trainer.protocols import Batch, JudgesSets, SampleRandom, Task
from trainer.rundir.keys import LIVE, evaluation_key, gap_error_key, gap_key
from trainer.rundir.pairs import Pairs
from trainer.teachers import Losses, losses_of, of_present_weights

EVAL_SETS = "eval_sets"
"""Entry of `meta.json`: number of samples of each further evaluation set."""


@dataclass(frozen=True)
class EvalBatch:
    """Samples of one forward of an evaluation; every rank has the same number of batches, all of the same size."""

    batch: Batch
    """Samples on the device."""
    valid: Tensor
    """bool `[samples]`, False for padding."""
    positions: Tensor
    """int64 `[samples]`, index of each sample in the whole evaluation set."""
    random: SampleRandom
    """Random numbers of the samples, the same in every evaluation of the run."""


class Average(Protocol):
    """Protocol of an average that can be evaluated; it comes from a run or from a checkpoint."""

    @property
    def started(self) -> bool:
        """Whether the average has started; before that it has no weights of its own."""
        ...

    def swapped_into(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which the model has the weights of the average."""
        ...


@dataclass
class Evaluation:
    """Callable that evaluates the live weights and every average."""

    task: Task
    batches: Callable[[], Iterable[EvalBatch]]
    """Function that yields the batches of this rank; it yields the same ones for the live weights and each average."""
    num_samples: int
    """Size of the whole evaluation set, over all ranks."""
    statistics_batches: Callable[[], Iterable[EvalBatch]] | None = None
    """Function that yields training samples, from which each average's BatchNorm statistics are estimated again. None
    uses the statistics that the average copied."""
    metrics: Mapping[str, CustomMetric] = field(default_factory=dict)
    """The user's own metrics by name."""
    copies: int = 1
    """Number of ranks that see the same samples."""
    averages: Sequence[str] = ()
    """Names of the run's averages, for a task that takes them."""
    sets: Mapping[str, "Evaluation"] = field(default_factory=dict)
    """Further evaluation sets by name; a metric of a set is called `<set>/<metric>`."""

    def __call__(
        self,
        network: Network,
        averages: Mapping[str, Average],
        *,
        live: bool = True,
        step: int = 0,
        keep: Callable[[Pairs], object] | None = None,
    ) -> dict[str, float]:
        """Return all metrics as in `metrics.jsonl`: `eval/live/loss`, `eval/ema/<name>/loss`, `eval/gap/<name>/loss`.

        An average that has not started yet is left out.

        Args:
            network: network with the live weights.
            averages: averages by name.
            live: whether the live weights are evaluated too; without them there are no gaps.
            step: step of the weights, for `keep`.
            keep: function that gets what every paired comparison of these weights needs; None on ranks that keep none.

        Memory: with `keep`, 8 bytes for each weights, metric and sample, on the CPU.

        Collectives: those of the model's forwards, and for each set one all-reduce for the live weights and for each
        average.
        """
        of_live = self.evaluate(network) if live else {}
        of_all = {LIVE: of_live} if live else {}
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
            if keep is not None:
                of_all[name] = values
        if keep is not None:
            metrics = dict.fromkeys(metric for values in of_all.values() for metric in values)
            keep(
                Pairs.of(
                    step,
                    {
                        metric: {name: values[metric].double().numpy() for name, values in of_all.items()}
                        for metric in metrics
                    },
                )
            )
        return record

    def evaluate(self, network: Network, *, reestimate: bool = False) -> dict[str, Tensor]:
        """Return the metrics of the weights that the model has now, float64 `[samples]`, the same on every rank.

        The metrics of the further sets follow, each with the samples of its set.

        Args:
            network: network whose weights are evaluated.
            reestimate: whether BatchNorm statistics are first estimated again from `statistics_batches`.

        Collectives: those of the model's forwards, and one all-reduce for each set.
        """
        if reestimate:
            self.reestimate(network)
        with evaluating(network):
            values: dict[str, Tensor] = {}
            for item in self.batches():
                with network.autocast():
                    metrics = measure(self.task, self.metrics, network.module, item.batch, item.random)
                for metric, samples in metrics.items():
                    # A sample has its value on `copies` ranks and zero on all others, so a sum over ranks joins them.
                    shape = (self.num_samples, *samples.shape[1:])
                    whole = values.setdefault(
                        metric, torch.zeros(shape, dtype=torch.float64, device=samples.device)
                    )
                    mask = item.valid.to(samples.device)
                    whole[item.positions.to(samples.device)[mask]] = samples[mask].double()
        joined = {name: whole / self.copies for name, whole in _joined(values).items()}
        return self.of_the_set(joined) | {
            f"{name}/{metric}": samples
            for name, further in self.sets.items()
            for metric, samples in further.evaluate(network).items()
        }

    def reestimate(self, network: Network) -> None:
        """Estimate the BatchNorm statistics of the model again, with the weights that it has now.

        Does nothing without `statistics_batches`.

        Collectives: those of the model's forwards, and one all-reduce.
        """
        if self.statistics_batches is None:
            return
        losses = self.losses(network)

        def forward(module: nn.Module, item: EvalBatch) -> None:
            # The training loss, because BatchNorm statistics come from training forwards.
            losses(module, item.batch, item.random)

        with evaluating(network), network.autocast():
            reestimate_batchnorm(network.module, self.statistics_batches(), forward=forward)
        network.buffers.average_statistics()

    def statistics(self, network: Network, averages: Mapping[str, Average]) -> dict[str, dict[str, Tensor]]:
        """Return the BatchNorm buffers with which each average is evaluated, by name of the average and of the buffer.

        Empty if evaluations do not estimate them again. An average that has not started yet is left out.

        Collectives: for each average those of `reestimate`.
        """
        if self.statistics_batches is None or not batchnorm_buffers(network.module):
            return {}
        found = {}
        for name, average in averages.items():
            if average.started:
                with average.swapped_into(network.module):
                    self.reestimate(network)
                    buffers = batchnorm_buffers(network.module)
                    found[name] = {key: buffer.clone() for key, buffer in buffers.items()}
        return found

    def of_the_set(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the metrics of the whole evaluation set from the values of each sample.

        Args:
            values: values of `measure` by name, float64 `[num_samples, ...]` on the CPU.

        Returns:
            One value per sample of each metric, float64 `[num_samples]`.

        Raises:
            ConfigError: The user's own metric has the same name as a metric of the task.
        """
        if not isinstance(self.task, JudgesSets):
            return values
        own = {name: values.pop(name) for name in self.metrics}
        task_metrics = self.task.set_metrics(values)
        for name in own:
            refuse_taken(name, task_metrics)
        return task_metrics | own

    def losses(self, network: Network) -> Losses:
        """Return the training loss of the task for a forward that trains nothing."""
        return losses_of(self.task, of_present_weights(self.averages, network))


def _joined(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the values of all ranks on the CPU by one all-reduce."""
    joined = sum_over_ranks(torch.cat([whole.flatten() for whole in values.values()]).cpu())
    parts = joined.split([whole.numel() for whole in values.values()])
    return {name: part.view(whole.shape) for (name, whole), part in zip(values.items(), parts, strict=True)}


def batchnorm_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that `reestimate_batchnorm` changes, by canonical name; shared ones under all their names."""
    return {
        f"{path}.{name}".lstrip("."): buffer
        for path, layer in named_modules(module)
        if isinstance(layer, _BatchNorm) and layer.track_running_stats
        for name, buffer in layer.named_buffers()
    }


def unfit_statistics(module: nn.Module, batches: int, averages: Mapping[str, EMAConfig]) -> list[str]:
    """Return a warning if averages are evaluated with running statistics of the live weights, which do not fit them.

    Args:
        module: model of the run.
        batches: `ema.batchnorm_batches`.
        averages: settings of the run's averages by name.
    """
    layers = [
        layer
        for layer in module.modules()
        if any(name.startswith("running_") for name, _ in layer.named_buffers(recurse=False))
        and not (batches and isinstance(layer, _BatchNorm))
    ]
    if not layers or all(average.average_buffers for average in averages.values()):
        return []
    kinds = ", ".join(dict.fromkeys(type(layer).__name__ for layer in layers))
    advice = "ema.average_buffers=['*running_*']"
    if any(isinstance(layer, _BatchNorm) for layer in layers):
        advice = f"ema.batchnorm_batches=10 or {advice}"
    return [
        f"ema.batchnorm_batches: {batches} evaluates each average with the running statistics of the live weights"
        f" ({kinds}), which do not fit it; set {advice}"
    ]


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
        **({EVAL_SETS: sizes} if sizes else {}),
    }


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

    def earlier(key: str) -> list[str]:
        listed = before.get(key)
        return [name for name in listed if name not in now] if isinstance(listed, list) else []

    units = before.get("metric_units")
    old_units = units.items() if isinstance(units, dict) else ()
    sizes = before.get(EVAL_SETS)
    if isinstance(sizes, dict):
        facts[EVAL_SETS] = sizes | facts.get(EVAL_SETS, {})
    return {
        **facts,
        "higher_is_better": sorted([*earlier("higher_is_better"), *facts["higher_is_better"]]),
        "direction_undeclared": sorted([*earlier("direction_undeclared"), *facts["direction_undeclared"]]),
        "metric_units": {
            **{name: unit for name, unit in old_units if name not in now},
            **facts["metric_units"],
        },
    }


@contextmanager
def evaluating(network: Network) -> Iterator[None]:
    """Run forwards without a backward inside: in eval mode and without gradients; reshard the parameters at the end."""
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
    """Return the mean of `live - average` over the samples and its standard error (NaN for a single sample)."""
    difference = live.double() - average.double()
    count = difference.numel()
    error = difference.std(correction=1) / count**0.5 if count > 1 else difference.new_tensor(float("nan"))
    return float(difference.mean()), float(error)
