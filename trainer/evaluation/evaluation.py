"""Evaluate the live weights and every average on the same batches with the same random numbers.

The gap between live weights and an average is computed sample by sample. Because both see the same samples and the same
noise, its standard error is that of a paired difference, far below that of the difference of two separate means.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ema import EMAConfig, reestimate_batchnorm
from ema.names import named_modules
from trainer.distributed.processes import on_main, sum_over_ranks
from trainer.distributed.sharding import Network, reshard
from trainer.errors import ConfigError
from trainer.evaluation.custom import CustomMetric, check_values, measure, refuse_taken
from trainer.evaluation.enough import Enough
from trainer.evaluation.race import Race, parts_of
from trainer.loop.teachers import Losses, losses_of, of_present_weights
from trainer.protocols import Batch, JudgesSets, SampleRandom, Task
from trainer.rundir.keys import (
    FURTHER_SAMPLES,
    LIVE,
    evaluation_key,
    gap_error_key,
    gap_key,
    raced_samples_key,
)
from trainer.rundir.pairs import Array, Pairs


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

    def swapped_into(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which the model has the weights of the average."""


@dataclass
class Evaluation:
    """Callable that evaluates the live weights and every average."""

    task: Task
    batches: Callable[..., Iterable[EvalBatch]]
    """Function that yields the batches of this rank; it yields the same ones for the live weights and each average.
    With a race or further samples, it takes the first position of the wanted samples and the one after the last."""
    num_samples: int
    """Size of the whole evaluation set, over all ranks."""
    statistics_batches: Callable[[], Iterable[EvalBatch]] | None = None
    """Function that yields training samples to estimate each average's BatchNorm statistics; None keeps the copied."""
    metrics: Mapping[str, CustomMetric] = field(default_factory=dict)
    """The user's own metrics by name."""
    copies: int = 1
    """Number of ranks that see the same samples."""
    averages: Sequence[str] = ()
    """Names of the run's averages, for a task that takes them."""
    sets: Mapping[str, "Evaluation"] = field(default_factory=dict)
    """Further evaluation sets by name; a metric of a set is called `<set>/<metric>`."""
    race: Race | None = None
    """Rule that eliminates averages after a part of the samples; None evaluates all on all samples."""
    enough: Enough | None = None
    """Rule for the number of further samples of the last evaluation; None takes none."""
    split_samples: int | None = None
    """Number of samples from which these were taken; None if that is not known."""

    def __call__(
        self,
        network: Network,
        averages: Mapping[str, Average],
        *,
        live: bool = True,
        step: int = 0,
        full: bool = True,
        keep: Callable[[Pairs], object] | None = None,
    ) -> dict[str, float]:
        """Return all metrics as in `metrics.jsonl`: `eval/live/loss`, `eval/ema/<name>/loss`, `eval/gap/<name>/loss`.

        An average that has not started yet is left out. So is one that a race eliminates; with a race, the record has
        the number of samples of each average. With a rule for further samples, a full evaluation takes these after all
        others, for `keep` only: all values of the record are means over the same samples as in every record before.

        Args:
            network: network with the live weights.
            averages: averages by name.
            live: whether the live weights are evaluated too; without them there are no gaps.
            step: step of the weights, for `keep`.
            full: whether all averages are evaluated on all samples, also with a race.
            keep: function that gets what every paired comparison of these weights needs; None on ranks that keep none.

        Memory: 8 bytes for each weights, metric and sample, on the CPU.

        Collectives: those of the model's forwards, and for each set and part one all-reduce for the live weights and
        for each average; in a race one broadcast for each part, with further samples one broadcast.
        """
        started = {name: average for name, average in averages.items() if average.started}
        lost: list[dict[str, Array]] = []
        record: dict[str, float] = {}
        if self.race is not None and live and len(started) > 1 and not full:
            of_all, lost, samples = self._raced(self.race, network, started)
            record = {raced_samples_key(name): float(count) for name, count in samples.items()}
        else:
            of_all = {LIVE: self.evaluate(network)} if live else {}
            for name, average in started.items():
                with average.swapped_into(network.module):
                    of_all[name] = self.evaluate(network, reestimate=True)
        record = _record(of_all) | record
        race = {self.race.metric: lost} if self.race is not None else None
        pairs = partial(Pairs.of, step, _tables(of_all), race)
        further: dict[str, dict[str, Array]] = {}
        if self.enough is not None and live and started and full:
            choose, metric = partial(self.enough.further, record), self.enough.metric
            if count := on_main(lambda: choose(pairs()), "choosing the number of samples"):
                further = {metric: self._further(network, started, count, metric)}
                record[FURTHER_SAMPLES] = float(count)
        if keep is not None:
            keep(pairs(further))
        return record

    def _further(
        self, network: Network, averages: Mapping[str, Average], count: int, metric: str
    ) -> dict[str, Array]:
        """Return the values of a metric on the `count` samples after those of every evaluation, by weights."""
        part = self.num_samples, self.num_samples + count
        found = {LIVE: self.measured(network, part)[metric].numpy()}
        for name, average in averages.items():
            with average.swapped_into(network.module):
                self.reestimate(network)
                found[name] = self.measured(network, part)[metric].numpy()
        return found

    def _raced(
        self, race: Race, network: Network, averages: Mapping[str, Average]
    ) -> tuple[dict[str, dict[str, Tensor]], list[dict[str, Array]], dict[str, int]]:
        """Evaluate the live weights on all samples, and each average until a race eliminates it.

        Returns:
            For the live weights and the averages that are left, what `evaluate` returns; the values of the deciding
            metric before each elimination; and for each average the number of its samples.

        Collectives: those of `measured` for each part, and one broadcast for each part.
        """
        seen: dict[str, dict[str, Tensor]] = {}
        further: dict[str, dict[str, Tensor]] = {}
        statistics: dict[str, dict[str, Tensor]] = {}
        samples, lost = dict.fromkeys(averages, 0), []
        alive, first = list(averages), 0
        while first < self.num_samples:
            ends = [self.num_samples] if len(alive) == 1 else parts_of(self.num_samples)
            part = first, next(end for end in ends if end > first)
            last = part[1] == self.num_samples
            for name in (LIVE, *alive):
                with averages[name].swapped_into(network.module) if name != LIVE else nullcontext():
                    if name != LIVE:
                        self._set_statistics(network, statistics, name)
                        samples[name] = part[1]
                    own = self.measured(network, part)
                    seen[name] = (
                        {key: torch.cat([seen[name][key], own[key]]) for key in own} if first else own
                    )
                    if last:
                        further[name] = self._of_further_sets(network)
            if not last:
                values: dict[str, Array] = {name: seen[name][race.metric].numpy() for name in (LIVE, *alive)}
                decide = partial(race.survivors, values, self.num_samples, len(averages) - 1)
                left = on_main(decide, "eliminating averages")
                if len(left) < len(alive):
                    lost.append(values)
                alive = left
            first = part[1]
        whole = {name: self.of_the_set(seen[name]) | further[name] for name in further}
        return whole, lost, samples

    def _set_statistics(self, network: Network, known: dict[str, dict[str, Tensor]], name: str) -> None:
        """Give the average in the model its BatchNorm statistics: estimated the first time, then those from `known`."""
        if self.statistics_batches is None:
            return
        if name not in known:
            self.reestimate(network)
            known[name] = {key: own.clone() for key, own in batchnorm_buffers(network.module).items()}
        for key, buffer in batchnorm_buffers(network.module).items():
            buffer.copy_(known[name][key])

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
        return self.of_the_set(self.measured(network)) | self._of_further_sets(network)

    def _of_further_sets(self, network: Network) -> dict[str, Tensor]:
        return {
            f"{name}/{metric}": samples
            for name, further in self.sets.items()
            for metric, samples in further.evaluate(network).items()
        }

    def measured(self, network: Network, part: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Return the values of `measure` for the samples of a part, or for all, the same on every rank.

        Raises:
            ConfigError: Metrics of a batch are not those of the first one, or not one value per sample.
        """
        first, last = part or (0, self.num_samples)
        with evaluating(network):
            values: dict[str, Tensor] = {}
            for item in self.batches() if part is None else self.batches(part):
                with network.autocast():
                    metrics = measure(self.task, self.metrics, network.module, item.batch, item.random)
                if values and metrics.keys() != values.keys():
                    raise ConfigError(
                        f"task: expected the metrics {', '.join(values)} of every batch, got {', '.join(metrics)}"
                    )
                for metric, samples in metrics.items():
                    # A sample has its value on `copies` ranks and zero on all others, so a sum over ranks joins them.
                    shape = (last - first, *samples.shape[1:])
                    whole = values.setdefault(
                        metric, torch.zeros(shape, dtype=torch.float64, device=samples.device)
                    )
                    mask = item.valid.to(samples.device)
                    whole[item.positions.to(samples.device)[mask] - first] = samples[mask].double()
        return {name: whole / self.copies for name, whole in _joined(values).items()}

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
        found: dict[str, dict[str, Tensor]] = {}
        for name, average in averages.items():
            if average.started:
                with average.swapped_into(network.module):
                    self._set_statistics(network, found, name)
        return found

    def of_the_set(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the metrics of the whole evaluation set from the values of each sample.

        Args:
            values: values of `measure` by name, float64 `[num_samples, ...]` on the CPU.

        Returns:
            One value per sample of each metric, float64 `[num_samples]`.

        Raises:
            ConfigError: A metric of the task is not one value per sample, or has the name of one of the user's own.
        """
        if not isinstance(self.task, JudgesSets):
            return values
        samples = len(next(iter(values.values())))
        own = {name: values.pop(name) for name in self.metrics}
        task_metrics = self.task.set_metrics(values)
        for name, found in task_metrics.items():
            check_values(f"task: metric {name} of a set", found, samples)
        for name in own:
            refuse_taken(name, task_metrics)
        return {name: found.double() for name, found in task_metrics.items()} | own

    def losses(self, network: Network) -> Losses:
        """Return the training loss of the task for a forward that trains nothing."""
        return losses_of(self.task, of_present_weights(self.averages, network))


def _record(of_all: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """Return the means of all weights, and the gaps of the averages to the live weights, by their keys."""
    record: dict[str, float] = {}
    of_live = of_all.get(LIVE, {})
    for name, values in of_all.items():
        record |= {evaluation_key(name, metric): float(own.mean()) for metric, own in values.items()}
        for metric in of_live if name != LIVE else ():
            gap, standard_error = paired_gap(of_live[metric], values[metric])
            record[gap_key(name, metric)] = gap
            record[gap_error_key(name, metric)] = standard_error
    return record


def _tables(of_all: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Array]]:
    """Return for each metric the values by weights."""
    metrics = next(iter(of_all.values()), {})
    return {key: {name: own[key].double().numpy() for name, own in of_all.items()} for key in metrics}


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
        f" ({kinds}), which do not fit it; train with {advice}, by resume= or anew"
    ]


@contextmanager
def evaluating(network: Network) -> Iterator[None]:
    """Run forwards without a backward inside: in eval mode and without gradients; reshard the parameters at the end."""
    modes = [(module, module.training) for module in network.module.modules()]
    network.module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        reshard(network.module)
        for module, training in modes:
            module.training = training


def paired_gap(live: Tensor, average: Tensor) -> tuple[float, float]:
    """Return the mean of `live - average` over the samples and its standard error (NaN for a single sample)."""
    difference = live.double() - average.double()
    count = difference.numel()
    error = difference.std(correction=1) / count**0.5 if count > 1 else difference.new_tensor(float("nan"))
    return float(difference.mean()), float(error)
