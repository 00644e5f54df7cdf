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

from trainer.config import ConfigError


def launched_world_size() -> int:
    """Number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """This process's rank under torchrun, 0 without it."""
    return int(os.environ.get("RANK", "0"))


def own_agent() -> str | None:
    """The torchrun process that started this one, `host:pid:start`; None without torchrun.

    It lives as long as its job and restarts the ranks, so a run directory that holds its name was begun by the same
    command. The start time (of Linux only, in ticks since the boot) tells it from an earlier process of that pid.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    pid = os.getppid()
    try:
        # Fields are counted from behind the command's name, which may hold blanks: the start is the 20th.
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        start = ""
    return f"{socket.gethostname()}:{pid}:{start}"


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


def complain(error: ConfigError) -> None:
    """Print bad input as one line; with HYDRA_FULL_ERROR=1, as for Hydra's own errors, also where it came from."""
    rank = launched_rank()
    print(f"error: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exception(error)
