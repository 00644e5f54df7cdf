"""Read the environment that torchrun sets for this process, and print bad input as one line; does not import torch."""

import hashlib
import os
import socket
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.shell.commands import torchrun_words
from trainer.shell.printable import one_line, print_text


def launched_world_size() -> int:
    """Return the number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """Return the rank of this process under torchrun, 0 without it."""
    return int(os.environ.get("RANK", "0"))


def launched_nodes() -> int:
    """Return the number of nodes of this job, each with one torchrun agent; 1 without torchrun."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def refuse_separate_tasks(name: str) -> None:
    """Refuse to run as one of several Slurm tasks without torchrun, because each task would be a run of its own.

    The message names the command, a name in `trainer.shell.commands.MODULES`.

    Raises:
        ConfigError: Slurm started several tasks of this command; the message has a command that joins them.
    """
    if "SLURM_STEP_ID" not in os.environ:  # a batch script is one process, whatever its job's number of tasks
        return
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or "1"
    if "SLURM_PROCID" not in os.environ or "RANK" in os.environ or not tasks.isdecimal() or int(tasks) < 2:
        return
    nodes = os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES") or "1"
    count = int(nodes) if nodes.isdecimal() and int(tasks) % max(1, int(nodes)) == 0 else 1
    command = " ".join(torchrun_words(name, int(tasks), max(1, count)))
    command = command.replace("HOST:", "$(hostname):").replace("JOB", "$SLURM_JOB_ID")
    raise ConfigError(
        f"SLURM_NTASKS: this is one of {tasks} tasks of Slurm without torchrun, and each would be a run of its own"
        " (to start such runs, put env -u SLURM_PROCID before the command);"
        f" for one run use: srun --nodes={max(1, count)} --ntasks-per-node=1 {command}"
    )


LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    "SLURM_PROCID",
)
"""Environment variables by which torchrun, or Slurm, makes a process one of several."""


def outside_torchrun() -> dict[str, str]:
    """Return the environment for a command that is a process of its own, not a rank of this job."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in (*LAUNCHER_VARIABLES, RESTARTS) and not name.startswith("TORCHELASTIC_")
    }


RESTARTS = "POLYAK_RESTARTS"
"""Environment variable that an attempt of a sweep sets for its run, because sweeps restart failed runs."""


def is_restart() -> bool:
    """Return whether torchrun, Slurm or a sweep may have restarted this process after a failure."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return RESTARTS in os.environ or any(os.environ.get(count, "0") != "0" for count in counts)


def own_agent() -> str | None:
    """Return the torchrun agent that started this process, as `host:pid:start`; None without torchrun.

    The agent runs as long as its job and restarts the ranks. So if a run directory contains the name of this agent, the
    same command made the directory. The start time distinguishes the agent from an earlier process with the same pid;
    it is empty on systems other than Linux.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    pid = os.getppid()
    start = process_start(pid)
    return f"{socket.gethostname()}:{pid}:{'' if start is None else start}"


def is_alive(agent: str) -> bool:
    """Return whether an agent (`own_agent`) certainly runs on this machine; False if that cannot be determined."""
    host, _, process = agent.partition(":")
    pid, _, start = process.partition(":")
    return host == socket.gethostname() and pid.isdecimal() and str(process_start(int(pid))) == start


def process_start(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since boot; None without such a process or without /proc."""
    try:
        # The name in parentheses may contain any character; the start is the 20th field after it (proc_pid_stat(5)).
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


@dataclass(frozen=True)
class Job:
    """One torchrun job: its agents on all nodes, the same after every restart of the ranks."""

    agents: tuple[str, ...]
    """Sorted agents (`own_agent`) of all nodes."""
    token: str
    """Six hex digits that are the same on every node and after every restart; two jobs may have the same token."""

    @classmethod
    def of(cls, agents: Iterable[str | None]) -> "Job | None":
        """Return the job of these agents, given in the order of the ranks; None without an agent.

        The token comes from the id of the job if the user gave one, else from the agent of rank 0. The id does not
        change if rank 0 restarts on another node, but a later job may have the same id.
        """
        present = [agent for agent in agents if agent is not None]
        if not present:
            return None
        run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        name = present[0] if run_id == "none" else run_id
        return cls(tuple(sorted(set(present))), hashlib.sha256(name.encode()).hexdigest()[:6])

    def began(self, meta: Mapping[str, Any]) -> bool:
        """Return whether this job started or resumed the run with this `meta.json`: an agent of it is listed there."""
        recorded = meta.get("torchrun_agents")
        return isinstance(recorded, list) and not set(self.agents).isdisjoint(map(str, recorded))


def complain(error: Exception, rank: int | None = None) -> None:
    """Print an error that names its cause as one line; with HYDRA_FULL_ERROR=1 also its traceback, as Hydra does.

    The line names `rank`, which raised it first; None is the rank of this process.
    """
    rank = launched_rank() if rank is None else rank
    print_text(f"error: {f'rank {rank}: ' if rank else ''}{one_line(error)}", error=True)
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exception(error)
