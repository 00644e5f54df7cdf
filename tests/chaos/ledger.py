"""Trials in processes of their own, and the ledger of what came out."""

import json
import os
import random
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OUTCOMES = ("equal", "refused", "harmless", "skipped", "wrong")


class Wrong(Exception):
    """The product did something that it must not do; the message is one line."""


class Skipped(Exception):
    """A trial that this machine cannot carry out; the message is the reason."""


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
