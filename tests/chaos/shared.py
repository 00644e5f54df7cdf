"""What all attacks share: a tiny run in forked processes, trials, and the ledger of what came out.

Starting a process that imports torch takes longer than the tiny run. So the command imports everything once, before any
thread starts, and forks: each trial is a child of it, and each session of a run is a child of its trial.
"""

import atexit
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.chaos import hook
from tests.integration.commands import assert_equal_runs, environment, free_port, records, train
from trainer.checkpoint.format import step_of
from trainer.checkpoint.store import newest_checkpoint
from trainer.config.schema import TrainerConfig

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
    "trainer.timeout_s=30",
    "logger=none",
)
"""A run of 12 steps with 4 checkpoints, of which two are kept."""
SESSION_TIMEOUT_S = 150.0
"""Longest time in seconds of one session in forked processes; one over it hangs, even on a busy machine."""
COMMAND_TIMEOUT_S = 240.0
"""The same for processes that import torch themselves."""
HAS_ASYNC = "async_save" in TrainerConfig.__dataclass_fields__
OUTCOMES = ("equal", "refused", "harmless", "skipped", "wrong")


class Wrong(Exception):
    """The product did something that it must not do; the message is one line."""


class Skipped(Exception):
    """A trial that this machine cannot carry out; the message is the reason."""


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
        except KeyboardInterrupt:
            traceback.print_exc()
            code = 130
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


@dataclass(frozen=True)
class Counts:
    """Outcome of a trial that makes many small attacks."""

    outcomes: dict[str, int]
    """Number of attacks by outcome."""
    faults: list[str]
    """What went wrong in each wrong one."""


@dataclass(frozen=True)
class Trial:
    """One attack on one run."""

    attack: str
    """Command-line name of the attack."""
    row: str
    """Row of the ledger."""
    name: str
    """Name that is the same in each call of the command with the same seed."""
    work: Callable[[random.Random], str | Counts]
    """Function that is called in a process and an empty folder of its own; returns one of `OUTCOMES`, or several."""
    phase: str = ""
    """Phase of the run that is attacked, for a second table; empty counts in the first one only."""


@dataclass
class Ledger:
    """How often each attack was tried, and what came out."""

    seed: int
    options: str = ""
    """Options of the command that name these trials again."""
    rows: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    phases: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    faults: list[dict[str, str]] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, trial: Trial, outcomes: Mapping[str, int], details: Sequence[str]) -> None:
        """Count the outcomes of a trial, with what went wrong or why it was skipped."""
        self.rows.setdefault((trial.attack, trial.row), Counter()).update(outcomes)
        if trial.phase:
            self.phases.setdefault((trial.attack, trial.phase), Counter()).update(outcomes)
        if outcomes.get("wrong"):
            again = f"python -m tests.chaos {trial.attack} {self.options} --trial '{trial.name}'"
            fault = {"attack": trial.attack, "on": trial.row, "reproduce": again}
            self.faults.extend({**fault, "fault": detail} for detail in details)
        else:
            self.notes.update(f"{trial.attack}, {trial.row}: skipped, {reason}" for reason in details)

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield one JSON object per row of each table, then one per fault."""
        for kind, rows in (("on", self.rows), ("phase", self.phases)):
            for (attack, name), counts in rows.items():
                numbers = {outcome: counts[outcome] for outcome in OUTCOMES}
                attempted = counts.total() - counts["skipped"]
                yield {"attack": attack, kind: name, "attempted": attempted, **numbers}
        yield from self.faults

    def table(self, kind: str) -> str:
        """Return the table of what was attacked (`on`), or of the phases (`phase`), as text."""
        heads = ["attack", kind, "attempted", *OUTCOMES]
        counted = [line for line in self.lines() if kind in line and "attempted" in line]
        cells = [[str(line[key]) for key in heads] for line in counted]
        rows = [heads, *cells, ["all", "", *(str(sum(line[key] for line in counted)) for key in heads[2:])]]
        widths = [max(len(row[k]) for row in rows) for k in range(len(heads))]
        aligned = [
            [
                text.ljust(width) if k < 2 else text.rjust(width)
                for k, (text, width) in enumerate(zip(row, widths, strict=True))
            ]
            for row in rows
        ]
        shown = ["  ".join(row) for row in aligned]
        rule = "-" * len(shown[0])
        return "\n".join([shown[0], rule, *shown[1:-1], rule, shown[-1]])


def carry_out(
    trials: Iterable[Trial], ledger: Ledger, folder: Path, *, jobs: int, seconds: float | None
) -> None:
    """Carry out trials in processes of their own, some at the same time, and count them.

    Args:
        trials: trials in the order in which they start.
        ledger: ledger to count in.
        folder: folder for one empty folder per trial; those of wrong trials are kept.
        jobs: number of trials at the same time.
        seconds: time after which no trial starts any more; None is no limit.
    """
    until = None if seconds is None else time.monotonic() + seconds
    running: dict[int, tuple[Trial, Path]] = {}
    for number, trial in enumerate(trials):
        if until is not None and time.monotonic() > until:
            break
        place = folder / f"{trial.attack}-{number:04d}"
        place.mkdir(parents=True)
        running[_begin(trial, place, ledger.seed)] = (trial, place)
        while len(running) >= jobs:
            _end_one(running, ledger)
    while running:
        _end_one(running, ledger)


def _begin(trial: Trial, place: Path, seed: int) -> int:
    """Start a trial and return its process; its outcome is in the file `outcome`, beside its folder."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.chdir(place)
        try:
            found = trial.work(random.Random(f"{seed} {trial.attack} {trial.name}"))
            counts = Counts({found: 1}, []) if isinstance(found, str) else found
        except Wrong as error:
            counts = Counts({"wrong": 1}, [str(error)])
        except Skipped as reason:
            counts = Counts({"skipped": 1}, [str(reason)])
        except BaseException:
            counts = Counts({"wrong": 1}, [traceback.format_exc()])
        place.with_suffix(".json").write_text(json.dumps(asdict(counts)))
    finally:
        os._exit(0)


def _end_one(running: dict[int, tuple[Trial, Path]], ledger: Ledger) -> None:
    """Wait for one of the running trials and count it."""
    pid, _ = os.wait()
    trial, place = running.pop(pid)
    result = place.with_suffix(".json")
    died = {"outcomes": {"wrong": 1}, "faults": ["the process of the trial died"]}
    counts = Counts(**(json.loads(result.read_text()) if result.exists() else died))
    ledger.add(trial, counts.outcomes, counts.faults)
    if counts.outcomes.get("wrong"):
        for fault in counts.faults:
            print(f"WRONG {trial.attack}, {trial.name}: {fault}\n  left in {place}", flush=True)
    else:
        shutil.rmtree(place)


def accepts(override: str) -> bool:
    """Return whether the command line of a run has this key."""

    def composed() -> int:
        from trainer.config.compose import compose, to_config

        to_config(compose([override])[0])
        return 0

    pid = os.fork()
    if pid == 0:
        with open(os.devnull, "w") as nowhere:
            _become(nowhere.fileno(), composed)
    return os.waitpid(pid, 0)[1] == 0
