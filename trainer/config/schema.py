"""Settings of a run: one dataclass per group of `conf/`, each field with its meaning, unit, range and reason.

Nothing here imports torch, so that `--help` and `--cfg job` answer at once. Hydra fills these classes
(`trainer.config.compose`) and `trainer.config.validate` checks ranges. All later code uses these dataclasses only.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from ema.config import EMAConfig

SECONDS = {"s": 1, "min": 60, "h": 3600}
"""Seconds of each unit of a duration."""
DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(s|min|h)", re.ASCII)
"""A duration: a number and its unit."""

AUTO = "auto"
"""Value of `trainer.eval_samples` that chooses the number of samples of the last evaluation by what it shows."""
AUTO_SAMPLES = 256
"""Samples of each evaluation with `trainer.eval_samples=auto`."""


@dataclass
class TrainerConfig:
    """The training loop: its length, its batches, and the intervals of logging, evaluation and saving."""

    steps: int = 1000
    """Optimizer steps of the whole run, at least 1."""
    global_batch_size: int = 32
    """Samples per optimizer step over all processes; divisible by the number of processes times `accumulate`."""
    accumulate: int = 1
    """Micro-batches per optimizer step and process, at least 1; gradients are synchronised in the last one only."""
    max_grad_norm: float = 1.0
    """Largest global L2 norm of the gradients; larger ones are scaled down to it. 0 turns clipping off."""
    non_finite: str = "skip"
    """Reaction to a non-finite gradient norm: `skip` the step on all ranks and count it, or `stop` the run."""
    log_every: int = 10
    """Steps between two records of training metrics, at least 1. Only these steps wait for the device."""
    eval_every: int = 100
    """Steps between two evaluations of the live weights and every average; the last step is always evaluated."""
    eval_samples: int | str = 256
    """Samples per evaluation, the same in every evaluation; 0 for the whole split; `auto` adds further ones at the end.
    `auto` takes 256, and at the last step 256 to 4096 further ones, as many as separate the best average from the live
    weights and from the other averages by the first 256. A split below 512 samples is evaluated as a whole."""
    eval_policy: str = "full"
    """`full` evaluates the live weights and every average on all samples, `race` does so at the last step only: before,
    an average that is clearly not the best on a part of the samples gets no more, so a large bank costs little."""
    eval_batch_size: int = 32
    """Samples per forward and process in an evaluation, at least 1."""
    sample_grids: bool = False
    """Whether each evaluation also draws images by the live weights and the best average, for a task that draws images;
    `samples/step-N.png` in the run directory. Costs as much as the grid of the report, for two weights."""
    save_every: int | str = "10min"
    """Steps between two checkpoints, or the time between them with its unit (`30s`, `10min`, `2h`) by rank 0's clock;
    0 saves at the end (and at a signal) only."""
    keep_checkpoints: int = 2
    """Number of checkpoints to keep, at least 1; older ones are deleted after a new one is committed."""
    async_save: bool = True
    """Whether a thread writes a copy of the state while the training goes on; it costs one more copy of it in host
    memory. The last checkpoint of a run is written before the run ends, from the state itself."""
    on_checkpoint: str | None = None
    """Command line that rank 0 starts after a checkpoint is committed, with `{path}`, `{step}` and `{run_dir}` filled
    in, such as `rclone copy {path} remote:mine/{step}`. No shell reads it, the training does not wait for it, and its
    output goes to `RUN_DIR/on_checkpoint.log`. Null starts none."""
    num_workers: int = 0
    """DataLoader worker processes per rank, at most 256; 0 reads in the training process."""
    num_threads: int = 0
    """CPU threads of torch per process, at most 1024; 0 leaves torch's own choice (torchrun sets one)."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: a GPU if there is one, else the CPU."""
    timeout_s: float = 600.0
    """Seconds that a collective may take before the job ends with an error, above 0; a batch may take 90% of them."""

    def samples_of(self, size: int) -> int:
        """Return the samples of each evaluation; with `eval_samples=auto`, those before the further ones.

        Args:
            size: number of samples of the evaluation split.
        """
        if self.eval_samples == AUTO:
            return size if size < 2 * AUTO_SAMPLES else AUTO_SAMPLES
        return min(int(self.eval_samples) or size, size)

    @property
    def save_steps(self) -> int:
        """Steps between two checkpoints; 0 if the clock or only the end decides."""
        return int(self.save_every) if str(self.save_every).isdecimal() else 0

    @property
    def save_s(self) -> float | None:
        """Seconds between two checkpoints; None if their steps decide."""
        found = DURATION.fullmatch(str(self.save_every))
        return float(found[1]) * SECONDS[found[2]] if found else None


STRATEGIES = {"none": False, "ddp": False, "fsdp": True, "hsdp": True}
"""Name of each function of `trainer.distributed.strategies`, and whether it shards the parameters."""


@dataclass
class ShardingConfig:
    """Distribution of the model over the processes."""

    _target_: str | None = None
    """Dotted path of a function (`trainer.protocols.ShardModel`) that replaces `strategy`; null uses `strategy`."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the function `_target_`."""
    strategy: str = "none"
    """`none` (one process), `ddp`, `fsdp` (FSDP2 over all ranks) or `hsdp` (FSDP2 within, replicas between)."""
    replicate: int = 1
    """hsdp: number of replicas, the outer mesh dimension; must divide the number of processes."""
    param_dtype: str | None = None
    """Dtype of the sharded forward and backward (`bfloat16`, `float16`, `float32`); null keeps the parameters' own.
    float16 scales the loss as torch's GradScaler does: a step that overflows is skipped and halves the scale."""
    reduce_dtype: str | None = None
    """Dtype in which gradients are reduced; null means `param_dtype`. float32 costs twice the traffic of bfloat16."""
    reshard_after_forward: bool = True
    """Whether a block frees its gathered parameters between forward and backward: less memory, one more all-gather."""
    activation_checkpointing: bool = False
    """Whether the backward recomputes each block's activations: about a third more compute, far less memory."""
    compile: bool = False
    """Whether each block is compiled by `torch.compile`."""
    block_classes: list[str] = field(default_factory=list)
    """Class names of the modules to shard one by one; empty takes the model's `shard_blocks` or `_no_split_modules`."""

    @property
    def scales_loss(self) -> bool:
        """Whether gradients are computed or reduced in float16, in which small ones would become 0."""
        return any(PRECISIONS.get(str(dtype)) == "float16" for dtype in (self.param_dtype, self.reduce_dtype))

    @property
    def shards(self) -> bool:
        """Whether parameters are sharded over the processes; assumed true for a user's own function."""
        return self._target_ is not None or STRATEGIES.get(self.strategy, False)


@dataclass
class EMAGroupConfig(EMAConfig):
    """The group `ema`: every field of `ema.EMAConfig`, and the set of averages that the run keeps.

    The run replaces automatic values of the four fields below down to `start_iter` (`trainer.config.averages`). All
    other settings of a rule reach `EMAConfig` as they are.
    """

    mode: str = "auto"
    """`full_tensor`, `local_shard`, or `auto`: `local_shard` if parameters are sharded, else `full_tensor`."""
    batch_size: int = 0
    """Samples per step, for `type=halflife` and `reference_batch_size`; 0 means `trainer.global_batch_size`."""
    num_iterations: int = 0
    """Steps of the whole run, for `type=cosine` and a user's own rule; 0 means `trainer.steps`."""
    start_iter: Any = 0
    """Step at which the averages start as copies of the live weights, at least 0, or a share of `trainer.steps` in
    (0, 1)."""
    enabled: bool = True
    """Whether the run keeps averages; `ema=off` sets false."""
    snapshots: int = 0
    """Snapshots of the averages to keep over the run, from which `polyak posthoc` makes other averages afterwards; 0
    keeps none. Each has the size of all averages; the first one, of step 0, that of the model."""
    snapshot_spacing: str = "uniform"
    """Steps of the snapshots: `uniform`, `geometric` (each the same factor after the one before), or `both`, half of
    them each."""
    snapshot_dtype: str = "float32"
    """How snapshots are stored: `float32`, the averages as they are; or `bfloat16`, half as large: each is the change
    since the one before, rounded with error feedback. The host then keeps one more copy of the averages, and a snapshot
    that is lost makes those after it useless."""
    batchnorm_batches: int = 0
    """Training batches for re-estimating an average's BatchNorm statistics before its evaluation, at least 0; with 0
    the average is evaluated with the statistics of the live model."""
    decays: list[float] = field(default_factory=list)
    """Decays of a bank: one average per decay, all updated in one pass. Empty keeps the one average of `decay`."""
    axis: int = 0
    """Most averages, at least 3, of a bank of constant decays from which every evaluation makes the best decay in
    between. Their horizons are powers of 2 up to about a quarter of `trainer.steps`; the longest are taken. The bank
    also keeps the initial weights. 0 keeps no such bank."""
    axis_grows: bool = False
    """Whether the bank of `axis` begins with its shortest horizons, from 2 on, in place of its longest. Each evaluation
    at which a longer average is clearly better then adds the next horizon, up to a quarter of `trainer.steps`, if three
    times that horizon is left of the run."""
    averages: dict[str, Any] | None = field(default_factory=dict)
    """A bank of averages that differ in more than decay: name -> fields of `ema.EMAConfig` in which the average
    differs from this group. Cannot be combined with `decays`; empty or null means none."""


@dataclass
class OptimizerConfig:
    """An optimizer of `torch.optim` by its class name, or the user's own by `_target_`."""

    _target_: str | None = None
    """Dotted path of an optimizer class or function (`trainer.protocols.MakeOptimizer`); null uses `name`."""
    name: str = "AdamW"
    """Class name in `torch.optim`; refused on a command line together with `_target_`."""
    lr: float = 1e-3
    """Peak learning rate, at least 0; the schedule multiplies it by a factor."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer (`betas`, `weight_decay`, `momentum`, `fused`, ...)."""
    decay_vectors: bool = False
    """Whether biases, norms and other tensors with fewer than two dimensions get weight decay too."""
    groups: dict[str, Any] = field(default_factory=dict)
    """Parameters with settings of their own: name -> `params`, a list of patterns (`blocks.*`) of parameter names, and
    any of `ndim`, `lr` or `lr_factor`, `args`, `decay_vectors`, `name` or `_target_`. The first group that matches a
    parameter takes it; all others keep the settings above."""


@dataclass
class ScheduleConfig:
    """The learning-rate schedule: a factor of `optimizer.lr` that depends on the step alone."""

    _target_: str | None = None
    """Dotted path of a function (`trainer.protocols.Schedule`); null uses the built-in schedule `name`."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the schedule."""
    name: str = "constant"
    """`constant`, `cosine`, `wsd` (warm-up, stable, decay) or `inverse_sqrt`; refused on a command line together with
    `_target_`."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0 that precede every schedule; at least 0."""
    decay_fraction: float = 0.2
    """Share of `trainer.steps` that the final decay of `wsd` takes, in (0, 1]."""
    min_ratio: float = 0.0
    """Factor at the last step of `cosine` and `wsd`, in [0, 1]."""


@dataclass
class LoggerConfig:
    """The logger that gets the metrics besides `metrics.jsonl`, which is always written."""

    _target_: str | None = None
    """Dotted path of a class with the methods of `trainer.protocols.Logger`; null uses the built-in logger `name`."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the class `_target_`, besides those that `trainer.protocols.Logger` lists."""
    name: str = "wandb"
    """`wandb`, `tensorboard`, `csv`, `trackio` or `none`; refused on a command line together with `_target_`."""
    also: list[str] = field(default_factory=list)
    """Further loggers: names, or dotted paths of classes without arguments. `logger=[wandb,csv]` on a command line
    means `logger=wandb logger.also=[csv]`."""
    mode: str = "offline"
    """Mode of wandb: `offline` (no data leaves the machine) or `online`."""
    project: str = "polyak"
    """Project in wandb or Trackio."""
    entity: str | None = None
    """Entity in wandb; null means the default of the account."""
    group: str | None = None
    """Group in wandb, such as the name of a sweep."""
    tags: list[str] = field(default_factory=list)
    """Tags in wandb."""


@dataclass
class InitConfig:
    """The names of `init_from` that may differ from the model's; by default every name and shape must agree."""

    rename: Any = None
    """List of `pattern -> replacement`, or a mapping: regular expressions, applied in order to the source's names."""
    missing: list[str] = field(default_factory=list)
    """Patterns (`head.*`) of the model's tensors that the source may lack; they keep their initial weights."""
    unexpected: list[str] = field(default_factory=list)
    """Patterns (`head.*`) of the source's tensors that the model may lack, by their names before `rename`. A tensor of
    another shape is skipped if its names match `missing` and `unexpected`."""


@dataclass
class Config:
    """The configuration of one run."""

    experiment: str = "custom"
    """Name of the experiment, part of the run directory's name; the files of `conf/experiment` set it."""
    run_dir: str | None = None
    """Directory to make for the run, which must not exist; null: `outputs/<UTC date-time>_<experiment>_<6 hex>`."""
    resume: str | None = None
    """Directory of the run to continue; other overrides on the command line change only the keys that they name."""
    resume_fallback: bool = False
    """`resume.fallback=true` on a command line: whether `resume` continues from the newest checkpoint that is whole if
    newer ones are damaged or cannot be read; these are renamed, not deleted."""
    fork: str | None = None
    """`RUN_DIR[@STEP]`: a new run begins with the whole state of that run at a checkpoint, the last by default: its
    weights, optimizer, averages and place in the data. Its configuration is that run's, changed by the overrides."""
    init_from: str | None = None
    """Weights that the run starts from, and its averages with it: a safetensors file, a file of torch.save, a folder
    of transformers or diffusers, or `RUN_DIR[:live|:ema/NAME][@STEP]`. `resume` does not read it again."""
    init: InitConfig = field(default_factory=InitConfig)
    accept_changed_records: bool = False
    """Whether `resume` continues although `metrics.jsonl` is missing or was changed since the checkpoint was saved."""
    seed: int = 0
    """Seed of the initial weights, the data order and all noise, at least 0."""
    allow_targets: list[str] = field(default_factory=list)
    """Further prefixes (`my_package.`) that a `_target_` may start with; valid on the command line only."""
    model: dict[str, Any] = field(default_factory=dict)
    """The model. `_target_`: any torch.nn.Module class; the other keys are arguments of its constructor."""
    task: dict[str, Any] = field(default_factory=dict)
    """The task. `_target_`: a class with the methods of `trainer.protocols.Task`; the other keys are its arguments."""
    data: dict[str, Any] = field(default_factory=dict)
    """The data. `_target_`: a callable that returns `trainer.protocols.Splits`; the other keys are its arguments."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """The user's own metrics: name -> `_target_`, a function, and options (see trainer/evaluation/custom.py)."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """The user's own callbacks: name -> `_target_` and arguments (`trainer.protocols.Callback`)."""
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    ema: EMAGroupConfig = field(default_factory=EMAGroupConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


PRECISIONS = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "fp32": "float32",
    "float32": "float32",
}
"""Accepted names of a precision, each with torch's name of its dtype."""
SHADOW_PRECISIONS = {**PRECISIONS, "fp64": "float64", "float64": "float64"}
"""Accepted names of the precision of an average's shadow weights, which may also be float64."""
