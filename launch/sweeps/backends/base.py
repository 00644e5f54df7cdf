"""What starts runs: one small protocol, chosen by `launch=NAME`."""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from launch.sweeps.config import LaunchConfig
from launch.sweeps.directory import Job, Sweep
from trainer.distributed.torchrun import torchrun_arguments
from trainer.errors import ConfigError


class Backend(Protocol):
    """Hands runs to whatever runs them."""

    def check(self, device: str) -> None:
        """Refuse a configuration of `launch` that cannot be had here, before anything is made.

        Args:
            device: `trainer.device` of the runs.

        Raises:
            ConfigError: naming the key.
        """

    def start(self, sweep: Sweep, jobs: Sequence[Job], allowed: Sequence[str]) -> bool:
        """Start these jobs, each by `run_command`; the caller holds the sweep.

        A backend with a queue of its own submits, notes each `job.handle`, saves the sweep and returns; one without
        returns when all have ended.

        Args:
            sweep: to be saved at each change of a job's state.
            jobs: those to start, none of which `held` knows.
            allowed: targets that this command line trusts.

        Returns:
            Whether the user stopped it.
        """

    def held(self, sweep: Sweep) -> Mapping[int, str]:
        """Jobs that are still in hand, by number: `running`, or `pending` in a queue. Nothing on disk says it."""


def run_command(run_dir: Path, launch: LaunchConfig, allowed: Sequence[str]) -> list[str]:
    """The command of a prepared run: it starts it, and carries it on, in as many processes of one machine."""
    overrides = [f"resume={quoted(str(run_dir))}"]
    if allowed:
        overrides.append(f"allow_targets=[{','.join(allowed)}]")
    return [*launcher(launch), "-m", "trainer", *overrides]


def launcher(launch: LaunchConfig) -> list[str]:
    """Python, or torchrun of this Python; for several machines with `HOST` to be filled in: the first one's name."""
    if launch.nodes * launch.processes_per_node == 1:
        return [sys.executable]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *torchrun_arguments(launch.processes_per_node, launch.nodes),
        # Schedulers send SIGUSR2 before a time limit. By default torchrun dies of it and leaves its ranks behind.
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2",
    ]
    return [*torchrun, "--standalone"] if launch.nodes == 1 else torchrun


def shutdown_timeout(launch: LaunchConfig) -> tuple[str, str]:
    """Environment variable and value: by itself torchrun kills ranks that are still saving after 30 seconds."""
    return "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(launch.signal_delay_s)


def quoted(value: str) -> str:
    """A value as Hydra reads it whole."""
    if re.fullmatch(r"[A-Za-z0-9_/.-]+", value):
        return value
    # Hydra reads a backslash as itself unless a quote follows it.
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"'{escaped}'"


def shown(command: Sequence[str]) -> str:
    """A command for people: with the names that their shell knows."""
    short = [*command]
    if short[:3] == [sys.executable, "-m", "torch.distributed.run"]:
        short[:3] = ["torchrun"]
    elif short[:1] == [sys.executable]:
        short[0] = "python"
    return shlex.join(short)


def refuse_nodes(launch: LaunchConfig) -> None:
    """Refuse more than one machine.

    Raises:
        ConfigError: naming the key.
    """
    if launch.nodes != 1:
        raise ConfigError(f"launch.nodes: this is one machine, got {launch.nodes}; clusters are launch=slurm")
