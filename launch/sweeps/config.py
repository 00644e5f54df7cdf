"""What the start of runs can be told: the group `launch` and the sweep's directory, on top of a whole run.

No torch here. Slots, nodes and queues are no part of the science: they are never frozen into a run.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.config.schema import Config
from trainer.errors import ConfigError


@dataclass
class LaunchConfig:
    """Where runs are started, and in how many processes each."""

    name: str = "local"
    """`local` (this machine), `slurm` or `print` (only shows the commands)."""
    nodes: int = 1
    """Machines per run, at least 1; more than 1 need a cluster."""
    processes_per_node: int = 1
    """Processes per machine and run, at least 1: one per GPU. More than one in all is started by torchrun."""
    slots: int | None = None
    """local: runs at once, at least 1. Null: as many as the GPUs, or else the CPU cores, are enough for."""
    time_min: int = 60
    """slurm: minutes until the job is sent back into the queue, at least 1; the run saves first and goes on later."""
    signal_delay_s: int = 90
    """Seconds that a run has to save once it is told to stop, at least 1. slurm: told so long before it."""
    partition: str | None = None
    """slurm: null is the cluster's default."""
    account: str | None = None
    """slurm: whom to charge; null is the cluster's default."""
    qos: str | None = None
    """slurm: quality of service; null is the cluster's default."""
    cpus_per_process: int = 1
    """slurm: cores for each process, at least 1; data loader workers need some, too."""
    gpus_per_node: int | None = None
    """slurm: GPUs of each node. Null: one for each process, none with `trainer.device=cpu`."""
    mem_gib: int | None = None
    """slurm: memory of each node in GiB; null is the cluster's default."""
    setup: list[str] = field(default_factory=list)
    """slurm: shell lines before the run, such as `module load cuda`."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """slurm: further options of sbatch, such as `{constraint: h100}`."""


@dataclass
class SweepConfig(Config):
    """A whole run, and how it is started."""

    open_nodes = (*Config.open_nodes, "launch.sbatch")
    sweep_dir: str | None = None
    """Directory to make for the sweep; must not exist. Null: `sweeps/<UTC date-time>_<experiment>_<6 hex>`."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)


BACKENDS = ("local", "slurm", "print")
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
}
"""Key, what its value must satisfy, and how to say so."""


def check_launch(launch: LaunchConfig) -> None:
    """Refuse what no backend can do.

    Raises:
        ConfigError: naming the key.
    """
    for key, value in asdict(launch).items():
        good, expected = RANGES.get(key, (lambda v: True, ""))
        if not good(value):
            raise ConfigError(f"launch.{key}: expected {expected}, got {value!r}")
    for key, value in launch.sbatch.items():
        # They become lines of a shell script.
        plain = isinstance(value, str | int | float | None) and "\n" not in str(value)
        if not re.fullmatch(r"\w[\w-]*", str(key)) or not plain:
            raise ConfigError(
                f"launch.sbatch: expected options of sbatch and plain values, got {key!r}: {value!r}"
            )


def world_size(launch: LaunchConfig) -> int:
    """Number of processes of a run."""
    return launch.nodes * launch.processes_per_node
