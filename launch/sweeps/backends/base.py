"""Protocol of the backends that start the runs of a sweep, and the commands that they start."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from launch.sweeps.config import LaunchConfig
from launch.sweeps.directory import Job, Sweep
from trainer.shell.commands import hydra_quoted, torchrun_arguments, trust

SIGNALS = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"
"""Argument of torchrun. Schedulers send SIGUSR2 before a time limit, which by default kills torchrun, not its ranks."""


class Backend(Protocol):
    """Part that starts runs, on this machine or on a cluster."""

    def check(self, device: str) -> None:
        """Check that runs with this `launch` and `trainer.device` can be started here, before any file is made.

        Raises:
            ConfigError: They cannot be started; the message names the key.
        """

    def start(self, sweep: Sweep, jobs: Sequence[Job], allowed: Sequence[str]) -> bool:
        """Start jobs, each with its `run_command`.

        A backend with a queue submits each job, sets `job.handle`, saves the sweep and returns. A backend without a
        queue returns when all jobs have ended.

        Args:
            sweep: Sweep whose lock the caller holds; it is saved at each change of a job's state.
            jobs: Jobs to start; none of them is in `held`.
            allowed: Prefixes of `_target_` that this command line trusts.

        Returns:
            Whether the user stopped the backend.
        """

    def held(self, sweep: Sweep) -> Mapping[int, str]:
        """Return the state of each job that is queued (`pending`) or `running`, by the job's number.

        The state comes from the queue or from locks, because the files of a run do not contain it.
        """


def run_command(run_dir: Path, launch: LaunchConfig, allowed: Sequence[str]) -> list[str]:
    """Return the command that starts or continues a prepared run, with the processes of one machine."""
    return [*launcher(launch), "-m", "trainer", *resuming(str(run_dir), allowed)]


def resuming(run_dir: str, allowed: Sequence[str]) -> list[str]:
    """Return the overrides that continue a run, with the prefixes of `_target_` that this command line trusts."""
    return [f"resume={hydra_quoted(run_dir)}", *trust(allowed)]


def launcher(launch: LaunchConfig) -> list[str]:
    """Return the beginning of a run's command: this Python or, for several processes, its torchrun.

    For several machines, it contains the placeholder `HOST` for the address of the first machine.
    """
    if launch.nodes * launch.processes_per_node == 1:
        return [sys.executable]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *torchrun_arguments(launch.processes_per_node, launch.nodes),
        SIGNALS,
    ]
    return [*torchrun, "--standalone"] if launch.nodes == 1 else torchrun


def import_variables() -> dict[str, str]:
    """Return environment variables with which a run imports this project, whatever its working directory contains."""
    root = Path(__file__).parents[3]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if root.name != "site-packages":  # a source tree, which may be importable only from the working directory
        paths.append(str(root))
    return {"PYTHONSAFEPATH": "1", **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})}


def shutdown_timeout(launch: LaunchConfig) -> tuple[str, str]:
    """Return the environment variable, with its value, for the time that torchrun gives its ranks to save.

    Without it, torchrun kills ranks that are still saving after 30 seconds.
    """
    return "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(launch.signal_delay_s)
