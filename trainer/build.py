"""Build the objects of a run from its configuration, the same on every rank."""

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ema import EMABank, EMAConfig
from trainer.config.averages import key_of, pitfalls_of
from trainer.config.eval_sets import KEY as EVAL_SETS
from trainer.config.eval_sets import further_sets, may_be_trained_on, primary_set
from trainer.config.facts import check_facts, sized
from trainer.config.schema import AUTO, Config
from trainer.config.targets import instantiate, load_rule
from trainer.config.trust import resolve_target
from trainer.config.validate import check_batch_size
from trainer.data.batches import (
    GlobalBatchSampler,
    eval_batches,
    first_row,
    micro_batch_size,
    to_device,
    train_batches,
)
from trainer.distributed.materialize import builds_on_meta
from trainer.distributed.processes import Processes, agreeing
from trainer.distributed.sharding import Network, shard
from trainer.errors import ConfigError, below, listed
from trainer.evaluation.custom import CustomMetric, load_metrics
from trainer.evaluation.enough import Enough
from trainer.evaluation.evaluation import EvalBatch, Evaluation
from trainer.evaluation.facts import metric_facts, refuse_without_direction
from trainer.evaluation.first_forward import check_batch, try_forwards
from trainer.evaluation.race import race_of
from trainer.loop.fit import Run
from trainer.loop.hooks import load_callbacks
from trainer.loop.misfits import check_saveable
from trainer.loop.step_metrics import TrainMetrics
from trainer.loop.teachers import refuse_without_averages
from trainer.optimizers import LossScale, lr_factor, make_optimizer
from trainer.protocols import Batch, CountsFlops, Dataset, DrawsImages, Splits, Task
from trainer.seeding import EVALUATION, StepRandom, micro_batch_random, mix, seed_step

EVALUATION_SEED = 0
"""Seed of the evaluation samples and their noise; it is fixed, so that runs with different seeds can be compared."""
SAMPLES = -2
"""Step number for the random numbers of the images that a task draws."""


@dataclass
class Evaluated:
    """Objects that an evaluation needs."""

    config: Config
    """The configuration with the sizes of the model that follow from the data."""
    splits: Splits
    task: Task
    network: Network
    processes: Processes
    """This process among all, with the part of each batch that the sharding gives this rank."""
    evaluation: Evaluation
    tokens_per_sample: int
    flops_per_sample: float
    primary_faults: Sequence[str]
    """Why the primary metric decides nothing; they are also warnings. A new run is refused for them, and so is a
    command line that chooses the metric (`refuse_typed`)."""


@dataclass
class Parts(Evaluated):
    """Objects of a run, built before its directory is made."""

    optimizer: Optimizer
    lr_factor: Callable[[int], float]
    bank: EMABank
    loss_scale: LossScale | None
    callbacks: dict[str, Any]
    """The user's own callbacks by name."""
    pitfalls: list[str]
    """What the user may not expect of the averages (`ema.advice.pitfalls`)."""


def build(
    config: Config, averages: Mapping[str, EMAConfig], evaluated: Evaluated, allowed: Sequence[str]
) -> Parts:
    """Build the optimizer and the averages over a model that has the weights that the run starts from.

    Args:
        config: validated configuration.
        averages: settings of each average by name, as `validate` returns them.
        evaluated: result of `build_evaluated`.
        allowed: further prefixes that a `_target_` may start with.

    Raises:
        ConfigError: An object cannot be built or does not fit the others; names the key; raised on every rank.

    Collectives: one object all-gather.
    """
    module = evaluated.network.module
    with agreeing("building the optimizer"):
        check_saveable(module)
        refuse_without_direction(config, evaluated.evaluation)
        check_batch_size(config, evaluated.processes.data_world_size)
        factor = lr_factor(config.schedule, config.trainer.steps, allowed)
        optimizer = make_optimizer(module, config.optimizer, allowed)
        bank = make_bank(config, averages, module, allowed)
        callbacks = load_callbacks(config.callbacks, allowed)
        rules = {name: average.rule for name, average in bank.items() if average.rule is not None}
        live_dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
        warnings = pitfalls_of(config, averages, rules, live_dtype)
    return Parts(
        **vars(evaluated),
        optimizer=optimizer,
        lr_factor=factor,
        bank=bank,
        loss_scale=LossScale(evaluated.processes.device) if config.sharding.scales_loss else None,
        callbacks=callbacks,
        pitfalls=warnings,
    )


def build_evaluated(
    config: Config, averages: Collection[str], processes: Processes, allowed: Sequence[str]
) -> Evaluated:
    """Build data, task and model, and try one forward.

    Args:
        config: validated configuration.
        averages: names of the run's averages, for a task that takes them.
        processes: result of `trainer.distributed.processes.join`.
        allowed: further prefixes that a `_target_` may start with.

    Raises:
        ConfigError: An object cannot be built or does not fit the others; names the key; raised on every rank.

    Collectives: those of sharding the model and of a forward; two object all-gathers.
    """
    with agreeing("building the data and the task"):
        splits = load_data(config, allowed)
        task: Task = instantiate(config.task, group="task", allowed=allowed)
        if config.trainer.sample_grids and not isinstance(task, DrawsImages):
            raise ConfigError(
                f"trainer.sample_grids: expected false, because {type(task).__name__} draws no images"
            )
        config, guessed = sized(config, splits, allowed)
        splits = replace(splits, warnings=[*splits.warnings, *guessed])
        check_facts(config, splits)
        refuse_without_averages(task, averages)
        further = _further_splits(config, splits, allowed)
    with agreeing("building the model", collectives=True):
        return _evaluated(config, averages, processes, allowed, splits, task, further)


def load_data(config: Config, allowed: Sequence[str]) -> Splits:
    """Load the data of a run, without its further evaluation sets.

    Raises:
        ConfigError: It cannot be loaded; names the key.
    """
    splits: Splits = instantiate(primary_set(config.data), group="data", allowed=allowed)
    return splits


def _further_splits(config: Config, splits: Splits, allowed: Sequence[str]) -> dict[str, Splits]:
    """Load the data of each further evaluation set (`data.eval_sets`); only its evaluation split is used."""
    further: dict[str, Splits] = {}
    for name, node in further_sets(config.data).items():
        with below(f"{EVAL_SETS}.{name}"):
            further[name] = instantiate(node, group="data", allowed=allowed)
            check_facts(config, further[name])
            expected, classes = (one.facts.get("classes") for one in (splits, further[name]))
            if expected is not None and classes is not None and classes != expected:
                raise ConfigError(
                    f"has the classes {listed(classes)}, expected those of data: {listed(expected)};"
                    " data.eval_path takes a folder that lacks some"
                )
    return further


def _evaluated(
    config: Config,
    averages: Collection[str],
    processes: Processes,
    allowed: Sequence[str],
    splits: Splits,
    task: Task,
    further: Mapping[str, Splits],
) -> Evaluated:
    metrics = load_metrics(config.metrics, allowed)
    network = shard(
        lambda: instantiate(config.model, group="model", allowed=allowed),
        config.sharding,
        processes,
        on_meta=builds_on_meta(resolve_target(config.model, group="model", allowed=allowed)),
        seed=mix(config.seed),
        allowed=allowed,
    )
    processes = replace(processes, data_part=network.data_part)
    evaluation = make_evaluation(config, averages, splits, task, metrics, processes, further)
    first, unfit, primary_faults = try_forwards(network, evaluation)
    model = network.module
    return Evaluated(
        config=config,
        splits=replace(
            splits,
            warnings=[*splits.warnings, *_further_warnings(config, splits, further), *unfit, *primary_faults],
        ),
        task=task,
        network=network,
        processes=processes,
        evaluation=evaluation,
        tokens_per_sample=task.tokens_per_sample(first),
        flops_per_sample=model.flops_per_sample() if isinstance(model, CountsFlops) else 0.0,
        primary_faults=primary_faults,
    )


def _further_warnings(config: Config, splits: Splits, further: Mapping[str, Splits]) -> list[str]:
    """Return the warnings of further evaluation sets that the data itself has not."""
    return may_be_trained_on(config.data) + [
        f"{EVAL_SETS}.{name}: {warning}"
        for name, own in further.items()
        for warning in own.warnings
        if warning not in splits.warnings
    ]


def make_bank(
    config: Config, averages: Mapping[str, EMAConfig], module: nn.Module, allowed: Sequence[str]
) -> EMABank:
    """Make the bank of a run's averages, and load the decay rules of the user."""
    rules = {
        name: load_rule(average.rule, allowed, key_of(config, name, "rule"))
        for name, average in averages.items()
        if average.rule is not None
    }
    return EMABank(module, averages, rules=rules)


def make_evaluation(
    config: Config,
    averages: Collection[str],
    splits: Splits,
    task: Task,
    metrics: Mapping[str, CustomMetric],
    processes: Processes,
    further: Mapping[str, Splits],
) -> Evaluation:
    """Make the evaluation of `trainer.eval_samples` samples of each set, the same with the same noise every time.

    `averages` are the names of the run's averages, `metrics` the user's own, and `further` the data of the further sets
    by name. `processes` has the part of each batch that the sharding gives this rank.
    """
    settings, world = config.trainer, processes.data_world_size
    fixed = partial(_fixed_batches, processes, settings.timeout_s)
    # Rounded up, since any number of processes may evaluate; in training the division has no remainder.
    micro_of_all = max(1, settings.global_batch_size // settings.accumulate)
    micro = -(-micro_of_all // world)
    statistics_samples = config.ema.batchnorm_batches * micro_of_all

    def over(dataset: Dataset) -> Evaluation:
        count = settings.samples_of(len(dataset))
        return Evaluation(
            task,
            lambda part=(0, count): fixed(dataset, 0, settings.eval_batch_size, part),
            count,
            metrics=metrics,
            copies=processes.world_size // world,
            averages=list(averages),
            split_samples=len(dataset),
        )

    primary = over(splits.eval)
    return replace(
        primary,
        enough=Enough(metric_facts(primary), len(splits.eval) - primary.num_samples)
        if settings.eval_samples == AUTO
        else None,
        race=race_of(settings, task, metrics),
        statistics_batches=(lambda: fixed(splits.train, statistics_samples, micro))
        if statistics_samples
        else None,
        sets={name: over(own.eval) for name, own in further.items()},
    )


def _fixed_batches(
    processes: Processes,
    timeout_s: float,
    dataset: Dataset,
    samples: int,
    batch_size: int,
    part: tuple[int, int] | None = None,
) -> Iterator[EvalBatch]:
    """Yield this rank's batches of an evaluation, always the same; arguments as for `eval_batches`."""
    total = min(samples, len(dataset)) or len(dataset)
    ours = (processes.data_rank, processes.data_world_size)
    for batch, valid, rows in eval_batches(
        dataset, samples, batch_size, *ours, EVALUATION_SEED, timeout_s, part
    ):
        check_batch(batch, len(rows))
        noise = StepRandom(EVALUATION_SEED, EVALUATION, total=total, device=processes.device, rows=rows)
        yield EvalBatch(to_device(batch, processes.device), valid, rows, noise)


def make_run(config: Config, parts: Parts, *, step: int = 0, samples: int = 0, skipped: int = 0) -> Run:
    """Make the state that the training loop needs.

    Args:
        config: validated configuration.
        parts: objects of the run, loaded with the state of `step`.
        step: number of optimizer steps done.
        samples: number of training samples that these steps used.
        skipped: number of steps skipped so far because they were not finite.
    """
    settings, processes = config.trainer, parts.processes
    layout = (settings.global_batch_size, settings.accumulate)
    micro = micro_batch_size(*layout, processes.data_world_size)
    return Run(
        config=settings,
        network=parts.network,
        task=parts.task,
        batches=_training_batches(config, parts, step, samples),
        random=micro_batch_random(
            config.seed,
            first=first_row(*layout, processes.data_rank, processes.data_world_size),
            count=micro,
            total=settings.global_batch_size,
            device=processes.device,
        ),
        reseed=partial(seed_step, config.seed, place=processes.data_rank),
        optimizer=parts.optimizer,
        peak_lr=config.optimizer.lr,
        lr_factor=parts.lr_factor,
        bank=parts.bank,
        measure=TrainMetrics(
            settings,
            tokens_per_sample=parts.tokens_per_sample,
            flops_per_sample=parts.flops_per_sample,
        ),
        skipped=torch.tensor(skipped, dtype=torch.int64, device=processes.device),
        micro_batch_size=micro,
        loss_scale=parts.loss_scale,
        skipped_before=skipped,
        step=step,
        samples=samples,
    )


def _training_batches(
    config: Config, parts: Parts, start_step: int, start_sample: int
) -> Generator[Batch, None, None]:
    settings, processes = config.trainer, parts.processes
    sampler = GlobalBatchSampler(
        len(parts.splits.train),
        settings.global_batch_size,
        settings.accumulate,
        processes.data_rank,
        processes.data_world_size,
        config.seed,
        start_step,
        settings.steps,
        start_sample,
    )
    return train_batches(
        parts.splits.train,
        sampler,
        device=processes.device,
        num_workers=settings.num_workers,
        timeout_s=settings.timeout_s,
    )


def sample_random(config: Config, task: Task, processes: Processes) -> Callable[[], StepRandom] | None:
    """Return a maker of the random numbers for sample images, equal on every rank; None for a task without images.

    It also seeds torch's global generators, from which a model may draw.
    """
    if not isinstance(task, DrawsImages):
        return None
    count = task.sample_count

    def random() -> StepRandom:
        seed_step(config.seed, SAMPLES, 0)
        return StepRandom(config.seed, SAMPLES, 0, count, count, processes.device)

    return random
