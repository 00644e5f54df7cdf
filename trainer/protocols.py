"""What the loop asks of a model, a task, a data set and a logger. It knows these, never a class.

A new task is one class with `losses` (and optionally `metrics` and `images`); a new
data set is one callable that returns `Splits`; both are named by a YAML file of `conf/`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from trainer.config.schema import ShardingConfig
    from trainer.distributed.processes import Processes

Batch = dict[str, Tensor]
"""Named tensors whose first dimension is the sample."""


class SampleRandom(Protocol):
    """Random numbers for the samples of one micro-batch.

    The numbers belong to the position of the sample in the *global* batch of the step: any number of processes
    and any accumulation draw the same ones, and an evaluation draws the same ones for the live weights and for
    every average.
    """

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float32 `[samples, *shape]`."""
        ...

    def uniform(self, *shape: int) -> Tensor:
        """Numbers uniform on [0, 1), float32 `[samples, *shape]`."""
        ...


class Dataset(Protocol):
    """A map-style data set that hands out whole batches (`__getitems__` is the DataLoader's own hook)."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The samples at `indices`, stacked, on the CPU."""
        ...


@dataclass(frozen=True)
class Splits:
    """What `conf/data` builds."""

    train: Dataset
    eval: Dataset
    facts: Mapping[str, Any]
    """Facts of the data for `model` and `task` to check against: `vocab_size`, `image_shape`, `num_classes`, ..."""


@runtime_checkable
class Task(Protocol):
    """How a model is called and scored."""

    primary_metric: str
    """Name of the metric that decides which weights are best; `loss` by default."""
    higher_is_better: Collection[str]
    """Names of the metrics of which more is better; of all others, less is."""
    metric_units: Mapping[str, str]
    """Unit of each metric that has one, for tables and axes: `{"loss": "nats per token"}`."""

    def losses(self, model: nn.Module, batch: Batch, random: SampleRandom) -> Tensor:
        """Training loss of each sample, differentiable, `[samples]` float32, in the task's unit (nats, ...)."""
        ...

    def metrics(self, model: nn.Module, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        """Evaluation metrics of each sample, `[samples]` float32 each; `loss` is one of them.

        A task that `JudgesSets` may add what its metrics of the whole set are made of.
        """
        ...

    def tokens_per_sample(self, batch: Batch) -> int:
        """Tokens (or patches) in one sample, 0 if the word has no meaning for this task."""
        ...


@runtime_checkable
class JudgesSets(Protocol):
    """A task with metrics of the whole evaluation set that are no means over samples (`trainer.tasks.set_metrics`).

    Its `metrics` may also answer with what these are made of, of any shape `[samples, ...]` and under names that begin
    with `set/`, which no metric has.
    """

    biased: Collection[str]
    """Metrics with a biased estimate, which differs between weights that are equally good. They name no winner."""

    def set_metrics(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute all metrics of the set from the values per sample of `metrics`.

        Args:
            values: float64 `[samples, ...]` on the CPU, in the order of the evaluation set, the same on every rank.

        Returns:
            float64 `[samples]` each: their mean is the metric, and its standard error is theirs.
        """
        ...


@runtime_checkable
class DrawsImages(Protocol):
    """A task that can show what the model makes (`conf/experiment/digits_flow`)."""

    sample_count: int
    """Images to draw."""

    def images(self, model: nn.Module, random: SampleRandom) -> Tensor:
        """Generated images, `[samples, channels, height, width]` float32 in [0, 1]; a collective under FSDP."""
        ...


@runtime_checkable
class CountsFlops(Protocol):
    """A model that knows its cost; `throughput/tflops` is logged for it."""

    def flops_per_sample(self) -> float:
        """Floating-point operations of the forward and backward of one sample, two per multiply-add."""
        ...


class ShardModel(Protocol):
    """A function that lays the model over the processes.

    A model with `init_weights` is on the meta device at that time and gets its weights afterwards, the same on any
    number of processes; any other one has them. Averages and checkpoints work on DTensor and on plain parameters, so
    tensor parallelism may be combined with FSDP2 (`trainer.distributed.strategies.fully_shard_blocks`).
    """

    def __call__(
        self, model: nn.Module, processes: "Processes", settings: "ShardingConfig", **args: Any
    ) -> "nn.Module | tuple[nn.Module, DeviceMesh]":
        """Shard `model` in place.

        Args:
            model: Its blocks are checkpointed and compiled already, if `settings` ask for it.
            processes: This rank among all of the run's, and its device.
            settings: The `sharding` group.
            **args: `sharding.args`.

        Returns:
            What the training forward calls: the model, or a wrapper of it. Where ranks must see the same samples, also
            the mesh over whose ranks each batch is cut: the dimensions of data parallelism.
        """
        ...


Cell = float | str | None
"""One cell of a table; None leaves it empty."""


class MakeOptimizer(Protocol):
    """A subclass of `torch.optim.Optimizer`, or a function that returns an optimizer.

    Only where it has an argument named `weight_decay`, biases and norms form a group of their own without decay.
    """

    def __call__(self, params: list[dict[str, Any]], *, lr: float, **args: Any) -> Optimizer:
        """Make the optimizer over parameter groups; `args` are `optimizer.args`."""
        ...


class Schedule(Protocol):
    """The learning rate over steps; a pure function, so that a resumed run needs no state of it."""

    def __call__(self, step: int, steps: int, **args: Any) -> float:
        """The factor of `optimizer.lr` at `step`, from 1 to `steps`; `args` are `schedule.args`."""
        ...


class Logger(Protocol):
    """A sink of metrics, on rank 0 only.

    Its constructor gets `logger.args` and, of these, the ones that it names: `config` (the `logger` group), `run_dir`
    (a Path), `run_id`, `run_config` (the whole configuration as dictionaries) and `resumed_at` (the step of the
    checkpoint that a resumed run starts from, else None).
    """

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, path: str) -> None:
        """A PNG file made at `step`."""
        ...

    def table(self, step: int, name: str, headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """A table made at `step`; each row has as many cells as there are headers."""
        ...

    def close(self, summary: Mapping[str, float | str], exit_code: int) -> None: ...
