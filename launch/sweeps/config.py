"""Configuration of a sweep: that of a run, the group `launch` and the sweep's directory.

No torch here. `launch` does not influence the results of a run, so it is not part of the run's frozen configuration.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.config.schema import Config
from trainer.errors import ConfigError, near


@dataclass
class LaunchConfig:
    """Settings for the start of runs: backend, processes and resources."""

    name: str = "local"
    """Backend: `local` (this machine), `slurm`, or `print` (only shows the commands)."""
    nodes: int = 1
    """Machines per run, at least 1; more than 1 needs a cluster."""
    processes_per_node: int = 1
    """Processes of a run on each machine, at least 1; one per GPU. torchrun starts runs of several processes."""
    slots: int | None = None
    """local: runs at the same time, at least 1. Null: as many as fit the GPUs or, without GPUs, the CPU cores."""
    time_min: int = 60
    """slurm: minutes until the run saves and its job goes back into the queue to continue later, at least 1."""
    signal_delay_s: int = 90
    """Seconds that a run has to save after a signal to stop, at least 1. slurm: also before the time limit."""
    partition: str | None = None
    """slurm: partition; null is the cluster's default."""
    account: str | None = None
    """slurm: account that is charged; null is the cluster's default."""
    qos: str | None = None
    """slurm: quality of service; null is the cluster's default."""
    cpus_per_process: int = 1
    """slurm, manifests: CPU cores for each process, at least 1, including cores for data loader workers."""
    gpus_per_node: int | None = None
    """slurm, manifests: GPUs of each node, at least 0. Null: one per process, or none with `trainer.device=cpu`."""
    mem_gib: int | None = None
    """slurm, manifests: memory of each node in GiB, at least 1; null is the cluster's default."""
    setup: list[str] = field(default_factory=list)
    """slurm, SkyPilot: shell commands before the run, such as `module load cuda`."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """slurm: further options of sbatch, such as `{constraint: h100}`."""
    format: str = "command"
    """print: what is printed for each run: its `command`, or the manifest of a Kubeflow `trainjob` or a `skypilot`
    task."""
    image: str | None = None
    """manifests: container image in which polyak is installed; a TrainJob needs it."""
    gpu_type: str | None = None
    """manifests: SkyPilot's name of the GPUs, such as `H100`."""
    runtime: str = "torch-distributed"
    """manifests: Kubeflow's training runtime, which mounts the disk of the run directories."""


@dataclass
class SweepConfig(Config):
    """Configuration of a run and of its start."""

    sweep_dir: str | None = None
    """Directory of the sweep: a new one, or that of a sweep to which the runs that it lacks are added. Null:
    `sweeps/<UTC date-time>_<experiment>_<6 hex>`."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)


_NAME = re.compile(r"\w[\w.,:@+-]{0,199}")
NAMES = "letters, digits and _ . , : @ + - (at most 200), or null"
_OPTION_VALUE = re.compile(r"[\w .,:@%+=/*|&()\[\]-]{0,500}")
"""Values of options: no quotes, line breaks, `$`, `;` or other characters with a meaning in a script."""
_ALLOWED = """
    acctg-freq begin clusters comment constraint contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu deadline
    delay-boot dependency distribution exclude exclusive extra-node-info gpu-bind gpu-freq gpus gpus-per-socket
    gpus-per-task gres gres-flags hint hold licenses mail-type mail-user mem-bind mem-per-cpu mem-per-gpu mincpus
    network nice no-kill nodelist ntasks-per-core ntasks-per-gpu ntasks-per-socket overcommit oversubscribe power prefer
    priority profile requeue reservation segment sockets-per-node spread-job switches thread-spec threads-per-core
    time-min tmp tres-bind tres-per-task use-min-nodes verbose wckey
"""
OPTIONS = frozenset(_ALLOWED.split())
"""Options of sbatch that `launch.sbatch` may set. The others run commands, change the environment, read or write files,
or belong to another key of `launch`."""
BACKENDS = ("local", "slurm", "print")
FORMATS = ("command", "trainjob", "skypilot")
_IMAGE = re.compile(r"\w[\w./:@-]{0,254}", re.ASCII)
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda v: v in BACKENDS, f"one of {', '.join(BACKENDS)}"),
    "nodes": (lambda v: v >= 1, "at least 1"),
    "processes_per_node": (lambda v: v >= 1, "at least 1"),
    "slots": (lambda v: v is None or v >= 1, "at least 1, or null"),
    "time_min": (lambda v: v >= 1, "at least 1"),
    "signal_delay_s": (lambda v: v >= 1, "at least 1"),
    "cpus_per_process": (lambda v: v >= 1, "at least 1"),
    "gpus_per_node": (lambda v: v is None or v >= 0, "at least 0, or null"),
    "mem_gib": (lambda v: v is None or v >= 1, "at least 1, or null"),
    "partition": (lambda v: v is None or bool(_NAME.fullmatch(v)), NAMES),
    "account": (lambda v: v is None or bool(_NAME.fullmatch(v)), NAMES),
    "format": (lambda v: v in FORMATS, f"one of {', '.join(FORMATS)}"),
    "image": (lambda v: v is None or bool(_IMAGE.fullmatch(v)), "the name of a container image, or null"),
    "gpu_type": (lambda v: v is None or bool(_NAME.fullmatch(v)), NAMES),
    "runtime": (lambda v: bool(_NAME.fullmatch(v)), NAMES),
    "qos": (lambda v: v is None or bool(_NAME.fullmatch(v)), NAMES),
}
"""Check of each value of `launch` by its key, with the text of what was expected."""


def check_launch(launch: LaunchConfig, *, recorded: bool = False) -> None:
    """Check the values of `launch`: their ranges, and the characters of those that reach a script or a command line.

    Args:
        launch: values to check.
        recorded: whether they come from the record of a sweep. Its options of sbatch may be any options, as earlier
            versions accepted them, because `launch.retry` uses only options that are typed again.

    Raises:
        ConfigError: A value is not allowed; the message names its key.
    """
    for key, value in asdict(launch).items():
        good, expected = RANGES.get(key, (lambda v: True, ""))
        if not good(value):
            raise ConfigError(f"launch.{key}: expected {expected}, got {value!r}")
    if launch.format != "command" and launch.name != "print":
        raise ConfigError(f"launch.format: read by launch=print only, and launch.name is {launch.name!r}")
    for key, value in launch.sbatch.items():
        (_check_recorded if recorded else _check_option)(str(key), value)


def _check_recorded(key: str, value: Any) -> None:
    is_plain = isinstance(value, str | int | float | None) and str(value).isprintable()
    if not re.fullmatch(r"\w[\w-]*", key) or not is_plain:
        raise ConfigError(
            f"launch.sbatch: expected options of sbatch and plain values, got {key!r}: {value!r}"
        )


def _check_option(key: str, value: Any) -> None:
    """Refuse an option of sbatch that is not in OPTIONS, or whose value may be more than a value in a shell script."""
    name = key.replace("_", "-")
    if name not in OPTIONS:
        raise ConfigError(
            "launch.sbatch: expected options of resources, queue or mail such as constraint, got"
            f" {key!r}{near(name, OPTIONS)}"
        )
    if not isinstance(value, str | int | float | None) or not _OPTION_VALUE.fullmatch(str(value)):
        raise ConfigError(
            f"launch.sbatch.{name}: expected letters, digits, spaces and . , : @ % + = / * | & ( ) [ ] - _,"
            f" got {value!r}"
        )


def gpus_of(launch: LaunchConfig, device: str) -> int:
    """Return the number of GPUs of each node, for runs with this `trainer.device`."""
    if launch.gpus_per_node is not None:
        return launch.gpus_per_node
    return 0 if device == "cpu" else launch.processes_per_node


def world_size(launch: LaunchConfig) -> int:
    """Return the number of processes of a run."""
    return launch.nodes * launch.processes_per_node
