"""What a run can be told: one dataclass per group of `conf/`, each value with its meaning, unit, range and reason.

Nothing here imports torch, so that `--help` and `--cfg job` answer at once. Hydra fills these classes
(`trainer.config.compose`), `validate` refuses what types cannot, and from there on the code sees dataclasses only.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ema.config import EMAConfig


@dataclass
class TrainerConfig:
    """The loop: how long, how much per step, how often to look."""

    steps: int = 1000
    """Optimizer steps of the whole run, at least 1."""
    global_batch_size: int = 32
    """Samples per optimizer step over all processes; divisible by the number of processes times `accumulate`."""
    accumulate: int = 1
    """Micro-batches per optimizer step and process, at least 1; gradients are synchronised on the last only."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm; 0 turns clipping off (the norm is logged all the same)."""
    non_finite: str = "skip"
    """What a step with a non-finite gradient norm does: `skip` it on all ranks and count it, or `stop` the run."""
    log_every: int = 10
    """Steps between two records of training metrics, at least 1. Only these steps wait for the device."""
    eval_every: int = 100
    """Steps between two evaluations of the live weights and every average; the last step is always evaluated."""
    eval_samples: int = 256
    """Samples per evaluation, the same ones each time; 0 means the whole evaluation split."""
    eval_batch_size: int = 32
    """Samples per forward and process in an evaluation, at least 1."""
    save_every: int = 0
    """Steps between two checkpoints; 0 saves at the end (and at a signal) only."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, at least 1; older ones are pruned after a new one is committed."""
    num_workers: int = 0
    """DataLoader worker processes per rank; 0 reads in the training process."""
    num_threads: int = 0
    """CPU threads of torch per process; 0 leaves torch's own choice (torchrun sets one)."""
    device: str = "auto"
    """`auto` takes a GPU if there is one, else the CPU; `cpu` and `cuda` insist."""
    timeout_s: float = 600.0
    """Seconds a collective may take before the job ends; above 0."""


STRATEGIES = {"none": False, "ddp": False, "fsdp": True, "hsdp": True}
"""The functions of `trainer.distributed.strategies` by name, and whether each cuts the parameters."""


@dataclass
class ShardingConfig:
    """How the model is laid over the processes."""

    _target_: str | None = None
    """A function (`trainer.protocols.ShardModel`), which replaces `strategy`; null takes the built-in one."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the function."""
    strategy: str = "none"
    """`none` (one process), `ddp`, `fsdp` (FSDP2 over all ranks) or `hsdp` (FSDP2 within, replicas between)."""
    replicate: int = 1
    """hsdp: number of replicas, the outer mesh dimension; must divide the number of processes."""
    param_dtype: str | None = None
    """Dtype of the sharded forward and backward (`bfloat16`, `float16`, `float32`); null keeps the parameters' own."""
    reduce_dtype: str | None = None
    """Dtype in which gradients are reduced; null means `param_dtype`. float32 costs twice the traffic of bfloat16."""
    reshard_after_forward: bool = True
    """Free the gathered parameters of a block between its forward and backward (less memory, one more all-gather)."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward (about a third more compute, far less memory)."""
    compile: bool = False
    """`torch.compile` each block."""
    block_classes: list[str] = field(default_factory=list)
    """Class names of the modules to shard one by one; empty asks the model (`shard_blocks`, `_no_split_modules`)."""

    @property
    def shards(self) -> bool:
        """Whether parameters are cut over the processes, as is assumed of a user's own function."""
        return self._target_ is not None or STRATEGIES.get(self.strategy, False)


@dataclass
class EMAGroupConfig(EMAConfig):
    """`conf/ema`: every field of `ema.EMAConfig`, and which averages the run keeps."""

    mode: str = "auto"
    """`full_tensor`, `local_shard`, or `auto`: `local_shard` wherever the sharding strategy shards."""
    batch_size: int = 0
    """Samples per step, for `type=halflife` and `reference_batch_size`; 0 takes `trainer.global_batch_size`."""
    enabled: bool = True
    """False trains without any average (`ema=off`)."""
    batchnorm_batches: int = 0
    """Training batches on which an average's BatchNorm statistics are re-estimated before it is evaluated; with 0
    it is evaluated with the live model's. At least 0."""
    decays: list[float] = field(default_factory=list)
    """A bank: one average per decay over one walk of the weights. Empty keeps the one average of `decay`."""
    averages: dict[str, Any] | None = field(default_factory=dict)
    """A bank of averages that differ in more than decay: name -> the fields of `ema.EMAConfig` in which it differs
    from this group. Not together with `decays`; empty or null is none."""


@dataclass
class OptimizerConfig:
    """Any optimizer of `torch.optim` by its class name, or your own by `_target_`."""

    _target_: str | None = None
    """Subclass of `torch.optim.Optimizer`, or a function (`trainer.protocols.MakeOptimizer`); null takes `name`."""
    name: str = "AdamW"
    """Class name in `torch.optim`."""
    lr: float = 1e-3
    """Peak learning rate, at least 0; `schedule` scales it."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the class (`betas`, `weight_decay`, `momentum`, `fused`, ...)."""
    decay_vectors: bool = False
    """Whether biases, norms and other tensors with fewer than two dimensions get weight decay too."""


@dataclass
class ScheduleConfig:
    """Learning rate over steps, as a factor of `optimizer.lr`; a pure function of the step."""

    _target_: str | None = None
    """A function (`trainer.protocols.Schedule`); null takes the built-in one of `name`."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the function."""
    name: str = "constant"
    """`constant`, `cosine` or `wsd` (warm-up, stable, decay)."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0, in front of every schedule; at least 0."""
    decay_fraction: float = 0.2
    """wsd: share of `trainer.steps` that decays at the end, in (0, 1]."""
    min_ratio: float = 0.0
    """Factor reached at the last step, in [0, 1]."""


@dataclass
class LoggerConfig:
    """Where metrics go besides `metrics.jsonl`, which is always written."""

    _target_: str | None = None
    """A class with `trainer.protocols.Logger`'s methods; null takes the built-in one of `name`."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the class, besides those that `trainer.protocols.Logger` lists."""
    name: str = "wandb"
    """`wandb`, `tensorboard` or `none`."""
    mode: str = "offline"
    """wandb: `offline` (default, nothing leaves the machine) or `online`."""
    project: str = "polyak"
    """wandb project."""
    entity: str | None = None
    """wandb entity; null is the account's default."""
    group: str | None = None
    """wandb group, e.g. the name of a sweep."""
    tags: list[str] = field(default_factory=list)
    """wandb tags."""


@dataclass
class Config:
    """A whole run."""

    open_nodes: ClassVar[tuple[str, ...]] = (
        "model",
        "task",
        "data",
        "metrics",
        "sharding.args",
        "optimizer.args",
        "schedule.args",
        "logger.args",
        "ema.averages",
    )
    """Nodes that take any key: what they build or `trainer.config.validate` knows which ones there are."""

    experiment: str = "custom"
    """Name of the run in its directory's name and in the logs; the files of `conf/experiment` set it."""
    run_dir: str | None = None
    """Directory to make for the run; must not exist. Null: `outputs/<UTC date-time>_<experiment>_<6 hex>`."""
    resume: str | None = None
    """Run directory to carry on; further overrides on the command line change just the keys they name."""
    seed: int = 0
    """Seed of initialisation, data order and noise; at least 0."""
    allow_targets: list[str] = field(default_factory=list)
    """Further prefixes (`my_package.`) that a `_target_` may start with; honoured from the command line only."""
    model: dict[str, Any] = field(default_factory=dict)
    """`_target_`: any torch.nn.Module class; the other keys are its constructor's arguments."""
    task: dict[str, Any] = field(default_factory=dict)
    """`_target_`: a class with `trainer.protocols.Task`'s methods; the other keys are its arguments."""
    data: dict[str, Any] = field(default_factory=dict)
    """`_target_`: a callable returning `trainer.protocols.Splits`; the other keys are its arguments."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Your own metrics: name -> `_target_`, a function, and more that trainer/evaluation/custom.py tells."""
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
"""Names a precision may be given by, and torch's own name of it."""
SHADOW_PRECISIONS = {**PRECISIONS, "fp64": "float64", "float64": "float64"}
"""Likewise for the shadow of an average, which nothing is computed with but itself."""
