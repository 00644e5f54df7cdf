"""Fill the disk at a moment of a run, free it, and resume: the result is that of the undisturbed run.

The disk is a small tmpfs of its own. The session that meets a full disk ends in one line or goes on, without a
traceback.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.chaos.kills import go_on
from tests.chaos.ledger import Skipped, Trial, Wrong
from tests.chaos.shared import RUN, Arm, command, expect_equal, run_here

SIZE = "24m"
MOMENTS = (
    "before the start",
    "claiming the directory",
    "before the first step",
    "logging",
    "evaluating",
    "taking the state",
    "writing tensors",
    "before the commit",
    "between rename and marker",
    "pruning",
    "final save",
    "report",
)


@contextmanager
def mounted(*options: str, at: Path) -> Iterator[None]:
    """Work in a file system that is mounted for this trial.

    Raises:
        Skipped: This user or this machine cannot mount it.
    """
    before = Path.cwd()
    at.mkdir()
    done = subprocess.run(["mount", *options, str(at)], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise Skipped(f"cannot mount a file system here ({reason})")
    try:
        os.chdir(at)
        yield
    finally:
        os.chdir(before)
        subprocess.run(["umount", "-l", str(at)], check=True)


def fill_here(chance: random.Random, *, moment: str, reference: Path) -> str:
    """Fill the disk of a run in a forked process at an event of a phase."""
    with mounted("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", at=Path("disk").absolute()):
        return _fill(chance, moment, reference)


def _fill(chance: random.Random, moment: str, reference: Path) -> str:
    report = moment == "report"
    arm = None
    if moment == "before the start":
        from tests.chaos.hook import fill

        fill("filler")
    else:
        events = json.loads((reference / "counts").read_text())[moment]
        arm = Arm(moment, chance.randint(1, events), "fill", ("filler",))
    ended = run_here(*RUN, "run_dir=run", arm=arm, report=report)
    if arm is not None and not arm.was_hit():
        raise Wrong(f"the moment was not hit, exit code {ended.code}: {ended.tail}")
    ended.expect(0, 1, 2)
    if ended.code and ended.error is None:
        raise Wrong(f"exit code {ended.code} without one line that begins with 'error: ': {ended.tail}")
    Path("filler").unlink()
    go_on(1, is_async=True, report=report).expect(0)
    expect_equal(reference / "run", Path("run"))
    if report and not Path("run/report/index.html").exists():
        raise Wrong("the report is missing")
    return "equal"


def fill_with_wandb(_: random.Random, *, reference: Path) -> str:
    """Fill the disk of a run that logs to wandb: the records decide, so the run ends as without wandb."""
    with mounted("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", at=Path("disk").absolute()):
        words = [sys.executable, "-m", "trainer", *RUN, "logger=wandb", "run_dir=run"]
        arm = Arm("logging", 20, "fill", ("filler",))
        ended = command(words, arm=arm)
        if not arm.was_hit():
            raise Wrong(f"the moment was not hit, exit code {ended.code}: {ended.tail}")
        ended.expect(0, 1)
        Path("filler").unlink()
        if not (Path("run") / "meta.json").exists():
            raise Wrong("the run directory is gone")
        if not list(Path("run/checkpoints").glob("step-*")):
            (Path("run") / "metrics.jsonl").rename("first.jsonl")
        run_here("resume=run", "logger=none").expect(0)
        expect_equal(reference / "run", Path("run"))
        return "equal"


def trials(count: int, references: Path, short: bool) -> Iterator[Trial]:
    """Yield one trial per moment, again and again."""
    reference = references / "1-async"
    # tests/integration/test_full_disk.py has those of the records and of the report.
    moments = ("writing tensors",) if short else (*MOMENTS, "wandb")
    for number in range(count):
        moment = moments[number % len(moments)]
        work = (
            partial(fill_with_wandb, reference=reference)
            if moment == "wandb"
            else partial(fill_here, moment=moment, reference=reference)
        )
        yield Trial("disk", f"full: {moment}", f"{number} {moment}", work)
