"""Protocols of the parts that a user may add: task, data set, logger, callback, optimizer, schedule and sharding.

The loop uses these protocols only, never a class. A new task is one class with the methods of `Task`. A new data set
is one callable that returns `Splits`. A YAML file of `conf/` names each by its `_target_`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ema import ExponentialMovingAverage
    from trainer.config.schema import ShardingConfig
    from trainer.distributed.processes import Processes

Batch = dict[str, Tensor]
"""Named tensors whose first dimension is the sample."""


class SampleRandom(Protocol):
    """Source of random numbers for the samples of one micro-batch.

    The numbers depend on the position of the sample in the *global* batch of the step. So they are the same for any
    number of processes and any accumulation, and in an evaluation for the live weights and every average.
    """

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers, float32 `[samples, *shape]`."""

    def uniform(self, *shape: int) -> Tensor:
        """Draw numbers uniform on [0, 1), float32 `[samples, *shape]`."""


class Dataset(Protocol):
    """A map-style data set that returns whole batches; torch's DataLoader calls `__getitems__`."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the samples at `indices`, each of them, as one batch on the CPU."""


@runtime_checkable
class Augments(Protocol):
    """A training split whose samples also depend on random numbers, such as augmented pictures."""

    def augmented(self, indices: Sequence[int], seeds: Sequence[int]) -> Batch:
        """Return the samples at `indices` as one batch on the CPU.

        Args:
            indices: index of each sample.
            seeds: seed of each sample, in [0, 2**63): a hash of the run's seed and of the sample's place in the run. It
                is the only source of random numbers, so that any number of ranks and workers gives the same samples.
        """


@dataclass(frozen=True)
class Splits:
    """Training split, evaluation split and facts of a data set."""

    train: Dataset
    eval: Dataset
    facts: Mapping[str, Any]
    """Facts of the data for `model` and `task` to check against: `vocab_size`, `image_shape`, `num_classes`, ..."""
    warnings: Sequence[str] = ()
    """Lines about the data to print before the first step; each names a key."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Clause with the cause of a fact, by its name, for the message if the model does not fit it."""


class Teacher(Protocol):
    """An average of the run that a task calls in place of the model, such as a mean teacher.

    A call takes the arguments of the model and returns what the model returns with the average's weights and buffers,
    without gradients. It may come before or after the call of the model, whose gradients stay the same bit for bit. It
    changes no buffer. Before the average has started, it has the live weights.
    """

    def __call__(self, *args: Any, train: bool = False, **kwargs: Any) -> Any:
        """Call the model with the average's weights.

        Args:
            *args: positional arguments of the model.
            train: whether in train mode. Then dropout takes random numbers, so that later ones of the step differ.
            **kwargs: keyword arguments of the model.

        Collectives: those of the model's forward; all ranks must call this equally often.
        """


@runtime_checkable
class Task(Protocol):
    """A task, which calls the model and computes losses and metrics.

    If `losses` has a further argument `averages`, it gets the averages of the run as teachers: a mapping from the names
    of the averages, as in the metrics, to `Teacher`s. An unknown name raises a ConfigError.
    """

    primary_metric: str
    """Name of the metric that decides which weights are best, such as `loss`."""
    higher_is_better: Collection[str]
    """Names of the metrics whose higher values are better; for all others lower values are better."""
    metric_units: Mapping[str, str]
    """Unit of each metric that has one, for tables and axes: `{"loss": "nats per token"}`."""

    def losses(self, model: nn.Module, batch: Batch, random: SampleRandom) -> Tensor:
        """Return the differentiable training loss of each sample, float32 `[samples]`, in the unit of the task."""

    def metrics(self, model: nn.Module, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        """Return the evaluation metrics of each sample, float32 `[samples]` each; `loss` is one of them.

        A task that is also a `JudgesSets` may add the values from which `set_metrics` computes its metrics.
        """

    def tokens_per_sample(self, batch: Batch) -> int:
        """Return the number of tokens (or patches) in one sample, 0 if samples of this task have none."""


@runtime_checkable
class JudgesSets(Protocol):
    """A task with metrics of the whole evaluation set that are no means over samples (`trainer.tasks.set_metrics`).

    Its method `metrics` may return further values for them, of any shape `[samples, ...]`, under names that begin with
    `set/`. No metric may have such a name.
    """

    biased: Collection[str]
    """Names of metrics whose estimate is biased and differs between equally good weights; they decide no comparison."""

    def set_metrics(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute all metrics of the evaluation set from the values per sample that `metrics` returned.

        Args:
            values: float64 `[samples, ...]` on the CPU, in the order of the evaluation set, the same on every rank.

        Returns:
            One value per sample of each metric, float64 `[samples]`. The mean of the values is the metric, and the
            standard error of that mean is the standard error of the metric.
        """


@runtime_checkable
class DrawsImages(Protocol):
    """A task that draws images with the model (`conf/experiment/digits_flow`)."""

    sample_count: int
    """Number of images to draw."""

    def images(self, model: nn.Module, random: SampleRandom) -> Tensor:
        """Generate images, float32 `[samples, channels, height, width]` in [0, 1]; a collective under FSDP."""


@runtime_checkable
class DrawsGuided(DrawsImages, Protocol):
    """A task that draws images at several scales of classifier-free guidance."""

    guidance_scales: Sequence[float]
    """Scales, each of which is drawn."""

    def images(self, model: nn.Module, random: SampleRandom, guidance: float | None = None) -> Tensor:
        """Generate images as `DrawsImages` does, at one scale; None means the first."""


@runtime_checkable
class CountsFlops(Protocol):
    """A model that counts its operations; `throughput/tflops` is logged for it."""

    def flops_per_sample(self) -> float:
        """Return the floating-point operations of one sample's forward and backward, two per multiply-add."""


class ShardModel(Protocol):
    """A function that distributes the model over the processes.

    A model with `init_weights` is on the meta device during the call and gets its weights afterwards, the same on any
    number of processes. Any other model has its weights already. Averages and checkpoints support DTensor and plain
    parameters, so tensor parallelism may be combined with FSDP2 (`trainer.distributed.strategies.fully_shard_blocks`).
    """

    def __call__(
        self, model: nn.Module, processes: "Processes", settings: "ShardingConfig", **args: Any
    ) -> "nn.Module | tuple[nn.Module, DeviceMesh]":
        """Shard `model` in place.

        Args:
            model: model whose blocks have activation checkpointing and compilation already, as `settings` asks.
            processes: this process among all of the run, with its device.
            settings: group `sharding` of the configuration.
            **args: values of `sharding.args`.

        Returns:
            The module that the training forward calls: the model, or a wrapper of it. If several ranks must see the
            same samples, a tuple of that module and the mesh of data parallelism, over which each batch is split.
        """


Cell = float | str | None
"""Content of a table cell; None leaves it empty."""


class MakeOptimizer(Protocol):
    """A subclass of `torch.optim.Optimizer`, or a function that returns an optimizer.

    If it has an argument named `weight_decay`, biases and norms form a parameter group without weight decay.
    """

    def __call__(self, params: list[dict[str, Any]], *, lr: float, **args: Any) -> Optimizer:
        """Make the optimizer over parameter groups; `args` are the values of `optimizer.args`."""


class Schedule(Protocol):
    """A learning-rate schedule: a pure function of the step, so that it has no state to save."""

    def __call__(self, step: int, steps: int, **args: Any) -> float:
        """Return the factor of `optimizer.lr` at `step` (1 to `steps`); `args` are the values of `schedule.args`."""


class RunView(Protocol):
    """What a callback reads of a run; its attributes cannot be set, and it shows the state at the time of reading."""

    @property
    def step(self) -> int:
        """Number of optimizer steps done."""

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the whole run."""

    @property
    def samples(self) -> int:
        """Number of training samples that these steps used."""

    @property
    def lr(self) -> float:
        """Learning rate of the step done last."""

    @property
    def model(self) -> nn.Module:
        """The model with the live weights; sharded, if the run shards it."""

    @property
    def averages(self) -> "Mapping[str, ExponentialMovingAverage]":
        """Averages by name, as in the metrics; `swapped_into(model)` puts one in place of the live weights."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Metrics of the last record of this session; empty before the first one."""

    @property
    def run_dir(self) -> Path:
        """Run directory."""


class Callback(Protocol):
    """A receiver of events of a run, on every rank. It needs at least one of the methods; the others may be missing.

    All ranks call the methods in the same order between two steps, so that they may use collectives. They must leave
    weights and modes of the model as they were. An error ends the run with exit code 2. A callback has no state in
    checkpoints. With an attribute `every`, an int of at least 1, `after_step` is called every so many steps only.
    """

    def after_step(self, run: RunView) -> None:
        """Receive the end of a step, also of a skipped one."""

    def after_evaluation(self, run: RunView) -> None:
        """Receive the end of an evaluation; its values are in `run.metrics`."""

    def after_checkpoint(self, run: RunView, step: int, path: Path) -> None:
        """Receive a committed checkpoint of `step`, at the next logged step after its commit."""

    def at_end(self, run: RunView) -> None:
        """Receive the end of a session without an error: all steps are done and reported, or a signal stopped it."""


class Logger(Protocol):
    """A receiver of metrics, on rank 0 only.

    Its constructor gets the values of `logger.args`. It also gets each of these that its signature names: `config` (the
    `logger` group), `run_dir` (a Path), `run_id`, `run_config` (the whole configuration as dictionaries) and
    `resumed_at` (the step of the checkpoint that a resumed run starts from, else None).
    """

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, path: str) -> None:
        """Log a PNG file made at `step`."""

    def table(self, step: int, name: str, headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Log a table made at `step`; each row has as many cells as there are headers."""

    def close(self, summary: Mapping[str, float | str], exit_code: int) -> None: ...
