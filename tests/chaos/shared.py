"""What all attacks share: a tiny run in forked processes, or in commands, and its comparison.

Starting a process that imports torch takes longer than the tiny run. So the command imports everything once, before any
thread starts, and forks: each trial is a child of it, and each session of a run is a child of its trial.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.chaos import hook
from tests.chaos.ledger import Wrong
from tests.integration.commands import assert_equal_runs, environment, free_port, records, train
from trainer.checkpoint.store import newest_checkpoint
from trainer.rundir.checkpoints import step_of

STEPS = 12
RUN = (
    "data=digits",
    "task=classification",
    "model=mlp",
    "model.hidden=16",
    "ema=bank",
    "ema.decays=[0.9,0.99]",
    f"trainer.steps={STEPS}",
    "trainer.global_batch_size=32",
    "trainer.log_every=1",
    "trainer.eval_every=4",
    "trainer.eval_samples=32",
    "trainer.save_every=3",
    "trainer.num_threads=1",
    "trainer.device=cpu",
    "trainer.timeout_s=120",
    "logger=none",
)
"""A run of 12 steps with 4 checkpoints, of which two are kept."""
SESSION_TIMEOUT_S = 200.0
"""Longest time in seconds of one session in forked processes; one over it hangs, even on a busy machine."""
COMMAND_TIMEOUT_S = 240.0
"""The same for processes that import torch themselves."""


@dataclass(frozen=True)
class Session:
    """One session of a run that has ended."""

    code: int
    """Exit code of rank 0, or minus the number of the signal that ended it."""
    printed: str
    """Everything that its processes printed."""

    @property
    def error(self) -> str | None:
        """The one line with which the session ended; None if it printed none, several, or a traceback."""
        lines = [line for line in self.printed.splitlines() if line.startswith("error: ")]
        return lines[0] if len(lines) == 1 and "Traceback" not in self.printed else None

    @property
    def refusal(self) -> str | None:
        """The one line of a refusal with exit code 2; None if this is none."""
        return self.error if self.code == 2 else None

    def expect(self, *codes: int) -> "Session":
        """Return this session.

        Raises:
            Wrong: It ended with another exit code, or with a traceback.
        """
        if self.code not in codes:
            raise Wrong(f"exit code {self.code}, expected {' or '.join(map(str, codes))}: {self.tail}")
        if "Traceback (most recent call last)" in self.printed:
            raise Wrong(f"a traceback, exit code {self.code}: {self.tail}")
        return self

    @property
    def tail(self) -> str:
        """The end of what was printed, as one line."""
        return " | ".join(line.strip() for line in self.printed.splitlines()[-3:])[-400:]


@dataclass(frozen=True)
class Arm:
    """What is done to a session at an event (`hook.arm`)."""

    phase: str
    number: int
    action: str
    arguments: tuple[Any, ...] = ()
    rank: int = 0

    def was_hit(self) -> bool:
        """Whether the action was carried out in the current folder."""
        return Path("hit").exists()


def run_here(
    *overrides: str,
    ranks: int = 1,
    arm: Arm | None = None,
    count: bool = False,
    report: bool = False,
    before: Callable[[], object] = lambda: None,
) -> Session:
    """Carry out a session in forked processes in the current folder, joined as torchrun joins them if there are two.

    Args:
        overrides: command line of `python -m trainer`.
        ranks: number of processes.
        arm: what is done to it; None disturbs nothing.
        count: whether rank 0 counts the events of each phase, into the file `counts`.
        report: whether the report is written, which takes longer than the rest.
        before: function that is called in each process before the session.

    Raises:
        Wrong: The session hangs.
    """
    port = free_port() if ranks > 1 else 0
    with tempfile.TemporaryFile() as output:
        leader, pids = 0, []
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, leader)
                _become(
                    output.fileno(),
                    lambda r=rank: _session(overrides, r, ranks, port, arm, count, report, before),
                )  # type: ignore[misc]
            leader = leader or pid
            os.setpgid(pid, leader)
            pids.append(pid)
        codes = _awaited(pids, leader, SESSION_TIMEOUT_S)
        output.seek(0)
        return Session(codes[0], output.read().decode(errors="replace"))


def _become(output: int, work: Callable[[], int]) -> None:
    """Carry out a function as a process of its own does, and end this process."""
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        try:
            code = work()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:
            traceback.print_exc()
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _session(
    overrides: Sequence[str],
    rank: int,
    ranks: int,
    port: int,
    arm: Arm | None,
    count: bool,
    report: bool,
    before: Callable[[], object],
) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["OMP_NUM_THREADS"] = "1"
    if ranks > 1:
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({name: str(value) for name, value in launched.items()})
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    before()
    if arm is not None and arm.rank == rank:
        hook.arm(arm.phase, arm.number, arm.action, *arm.arguments, done="hit")
    if count and rank == 0:
        hook.count("counts")
    with ExitStack() as stack:
        if not report:
            stack.enter_context(patch("trainer.run.write_result", lambda *_: None))
        return train(overrides)


def _awaited(pids: Sequence[int], group: int, timeout_s: float) -> list[int]:
    """Wait for processes and return their exit codes; kill their group at the time-out."""
    codes: dict[int, int] = {}
    until = time.monotonic() + timeout_s
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
        if time.monotonic() > until:
            os.killpg(group, signal.SIGKILL)
            for pid in pids:
                if pid not in codes:
                    os.waitpid(pid, 0)
            raise Wrong(f"hangs: no end after {timeout_s:g} s")
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def command(
    words: Sequence[str],
    *,
    arm: Arm | None = None,
    in_ranks: bool = False,
    timeout_s: float = COMMAND_TIMEOUT_S,
) -> Session:
    """Carry out a command in processes of its own in the current folder, with what is done to one of them.

    Raises:
        Wrong: It hangs.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, env=armed(arm, in_ranks), start_new_session=True
        )
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise Wrong(f"hangs: no end after {timeout_s:g} s") from None
        finally:
            end_marked()
        output.seek(0)
        return Session(code, output.read().decode(errors="replace"))


def armed(arm: Arm | None = None, in_ranks: bool = False) -> dict[str, str]:
    """Return the environment of a command, which marks all its processes as those of this trial."""
    variables = environment({"CHAOS_TRIAL": os.getcwd(), "PYTHONUNBUFFERED": "1"})
    if arm is not None:
        site = Path("site").absolute()
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(hook.SITE)
        variables["PYTHONPATH"] = f"{site}{os.pathsep}{variables['PYTHONPATH']}"
        spec = {"arm": [arm.phase, arm.number, arm.action, *arm.arguments], "rank": arm.rank}
        spec |= {"done": str(Path("hit").absolute()), "needs_rank": in_ranks}
        variables[hook.VARIABLE] = json.dumps(spec)
    return variables


def marked() -> list[int]:
    """Return the processes that a command of this trial started and that are alive."""
    mark, found = f"CHAOS_TRIAL={os.getcwd()}".encode(), []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if int(place.name) != os.getpid() and mark in (place / "environ").read_bytes().split(b"\0"):
                found.append(int(place.name))
        except OSError:  # it has ended, or belongs to another user
            continue
    return found


def end_marked() -> None:
    """Kill all processes of this trial's commands."""
    for pid in marked():
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def reached(run: Path) -> int:
    """Return the step of the newest checkpoint, 0 without one."""
    checkpoint = newest_checkpoint(run / "checkpoints")
    return step_of(checkpoint) if checkpoint else 0


def last_recorded(run: Path) -> int:
    """Return the last step on record, 0 without one."""
    return max((record["train/step"] for record in records(run)), default=0)


def expect_equal(reference: Path, run: Path) -> None:
    """Compare weights, averages, optimizer, progress and records with those of the undisturbed run, bit for bit.

    Raises:
        Wrong: Something differs.
    """
    try:
        assert_equal_runs(reference, run)
    except Exception as error:
        raise Wrong(f"continued with other numbers: {type(error).__name__} {str(error)[:200]}") from error
