"""What torchrun says of this process, and how a process says what is wrong; without importing torch."""

import hashlib
import os
import socket
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError


def launched_world_size() -> int:
    """Number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """This process's rank under torchrun, 0 without it."""
    return int(os.environ.get("RANK", "0"))


def launched_nodes() -> int:
    """Number of torchrun agents of this job, one a node; 1 without torchrun."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


RESTARTS = "POLYAK_RESTARTS"
"""Environment variable set by what starts a run again by itself after a failure: an attempt of a sweep."""


def is_restart() -> bool:
    """Return whether a restart without a user may be this process: of torchrun, or of a sweep."""
    return RESTARTS in os.environ or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def torchrun_arguments(processes_per_node: int, nodes: int) -> list[str]:
    """Return the arguments of torchrun for this many processes; on several nodes, `HOST` is to be replaced by one."""
    each = f"--nproc-per-node={processes_per_node}"
    if nodes == 1:
        return [each]
    return [f"--nnodes={nodes}", each, "--rdzv-backend=c10d", "--rdzv-endpoint=HOST:29400"]


def launcher(world_size: int, nodes: int) -> tuple[str, str]:
    """Return the command to type before `-m trainer` for this many processes, and a shell comment, which may be empty.

    The comment names what the user must fill in.
    """
    if world_size == 1:
        return "python", ""
    command = " ".join(["torchrun", *torchrun_arguments(world_size // nodes, nodes)])
    if nodes == 1:
        return command, ""
    return f"{command} --rdzv-id=JOB", f"  # on each of the {nodes} nodes; HOST: one of them, JOB: any name"


def own_agent() -> str | None:
    """The torchrun process that started this one, `host:pid:start`; None without torchrun.

    It lives as long as its job and restarts the ranks, so a run directory that holds its name was begun by the same
    command. The start time (of Linux only) tells it from an earlier process of that pid.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    pid = os.getppid()
    start = process_start(pid)
    return f"{socket.gethostname()}:{pid}:{'' if start is None else start}"


def is_alive(agent: str) -> bool:
    """Whether an `own_agent` is known to live: on this machine, and where processes have a start."""
    host, _, process = agent.partition(":")
    pid, _, start = process.partition(":")
    return host == socket.gethostname() and pid.isdecimal() and str(process_start(int(pid))) == start


def process_start(pid: int) -> int | None:
    """Clock ticks from the machine's start to the process's; None if there is no such process, or no /proc."""
    try:
        # The name in parentheses may hold anything; the start is the 20th field after it (proc_pid_stat(5)).
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


@dataclass(frozen=True)
class Job:
    """One torchrun command, over all its nodes and restarts."""

    agents: tuple[str, ...]
    """`own_agent` of every node, sorted."""
    token: str
    """Six hex digits that are the same on every node and after every restart; not unique to the job."""

    @classmethod
    def of(cls, agents: Iterable[str | None]) -> "Job | None":
        """The job of these ranks' agents, in order of rank; None if they have none.

        The id that the user gave the job names it even where rank 0 came back on another node. It does not identify
        it: tomorrow's job may be given the same one.
        """
        known = [agent for agent in agents if agent is not None]
        if not known:
            return None
        run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        name = known[0] if run_id == "none" else run_id
        return cls(tuple(sorted(set(known))), hashlib.sha256(name.encode()).hexdigest()[:6])

    def began(self, meta: Mapping[str, Any]) -> bool:
        """Whether a run with this `meta.json` was begun or carried on by this job: they share an agent."""
        recorded = meta.get("torchrun_agents")
        return isinstance(recorded, list) and not set(self.agents).isdisjoint(map(str, recorded))


def complain(error: ConfigError, rank: int | None = None) -> None:
    """Print bad input of `rank` as one line; with HYDRA_FULL_ERROR=1 also its traceback, as for Hydra's own errors.

    Args:
        error: bad input.
        rank: the rank that has it; this process's if None.
    """
    rank = launched_rank() if rank is None else rank
    print(f"error: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exception(error)
