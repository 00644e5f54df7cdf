"""What torchrun's restarts must give: the result of the undisturbed run, and the cause of a failure read first.

The expected numbers are those of the same command without a failure, bit for bit: the same ranks, the same shards.
Where the test is about what a restart finds and not about how ranks end, attempts run in processes that are there.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.integration.commands import (
    TIMEOUT_S,
    Warm,
    assert_equal_runs,
    command,
    environment,
    importable_here,
    records,
    run_to_end,
)
from tests.makers import TINY_GPT

STEPS = 14
TIMEOUT_OF_A_WAIT_S = 3
RUN = (
    *TINY_GPT,
    "ema=bank",
    "ema.decays=[0.9,0.99]",
    "sharding=fsdp",
    f"trainer.steps={STEPS}",
    "trainer.log_every=1",
    "trainer.save_every=2",
)
TASK = '''
import os
import time

from trainer.tasks.language_modeling import LanguageModeling


class Faulty(LanguageModeling):
    """Some ranks fail in their first attempts, in each in the way and at the place named."""

    def __init__(self, faults=(), step=0, ranks=(1,)):
        faults = dict(enumerate(faults)) if int(os.environ["RANK"]) in ranks else {}
        self.fault = faults.get(int(os.environ["TORCHELASTIC_RESTART_COUNT"]), "")
        self.step = step
        if self.fault == "build":
            raise OSError("no answer")
        if self.fault == "sleep in build":
            self.sleep()

    def sleep(self):
        while not os.path.exists("rank 0 has ended"):
            time.sleep(0.01)

    def losses(self, model, batch, random):
        if model.training:
            self.step -= 1
            if self.fault == "raise" and self.step == 0:
                raise ValueError(f"rank {os.environ['RANK']} has bad data")
        return super().losses(model, batch, random)

    def metrics(self, model, batch, random):
        if self.fault == "sleep in evaluation" and self.step < 0:  # once it trains: evaluations are tried before
            self.sleep()
        return super().metrics(model, batch, random)
'''


def finish(*arguments: str, cwd: Path, ranks: int = 2, restarts: int = 3) -> tuple[int, str]:
    """Run to the end; the exit code and stderr."""
    done = run_to_end(command(*arguments, ranks=ranks, restarts=restarts), cwd=cwd, check=False)
    return done.returncode, done.stderr


def rank_pids(agent: int) -> list[int]:
    """Processes that a torchrun started, in the order of their start."""
    children = Path(f"/proc/{agent}/task/{agent}/children")
    return [
        int(pid)
        for pid in children.read_text().split()
        if b"\0RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    ]


def kill_one(folder: Path, chance: random.Random) -> str:
    """Run in two processes and kill -9 one of them at a random step; what it printed."""
    step, victim = chance.randrange(1, STEPS - 1), chance.randrange(2)
    print(f"kill -9 of rank {victim} after step {step}")
    process = subprocess.Popen(
        command(*RUN, "run_dir=run", ranks=2, restarts=3),
        cwd=folder,
        env=environment({"PYTHONUNBUFFERED": "1"}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    printed: list[str] = []
    killed = False
    try:
        for line in process.stdout:  # one line per logged step: reading it is the wait
            printed.append(line)
            if not killed and line.startswith(f"step {step}/"):
                os.kill(rank_pids(process.pid)[victim], signal.SIGKILL)
                killed = True
        assert process.wait(TIMEOUT_S) == 0, "".join(printed)
    finally:
        process.kill()
        process.stdout.close()
    assert killed
    return "".join(printed)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    """The run without a failure."""
    folder = tmp_path_factory.mktemp("undisturbed")
    warm(*RUN, "run_dir=run", cwd=folder, ranks=2)
    return folder / "run"


@pytest.mark.skipif(sys.platform != "linux", reason="the ranks of a torchrun are found in /proc")
@pytest.mark.parametrize("trial", range(int(os.environ.get("POLYAK_KILLS", "1"))))
def test_kill_9_of_one_rank_at_a_random_step_ends_with_the_result_of_the_undisturbed_run(
    undisturbed: Path, tmp_path: Path, trial: int
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    printed = kill_one(tmp_path, random.Random(seed))
    assert printed.count("run directory: ") == 2, printed
    assert_equal_runs(undisturbed, tmp_path / "run")


def test_a_failing_rank_is_read_first_and_the_restart_finds_the_directory_that_nobody_named(
    undisturbed: Path, tmp_path: Path
) -> None:
    (tmp_path / "faulty.py").write_text(TASK)
    fault = ("task._target_=faulty.Faulty", "+task.faults=[raise]", "+task.step=7")
    code, printed = finish(*RUN, *fault, cwd=tmp_path)
    assert code == 0, printed
    first = re.search(r"^.*Traceback \(most recent call last\).*$", printed, re.MULTILINE)
    assert first is not None and first[0].startswith("[rank1]: "), printed
    assert printed.index("ValueError: rank 1 has bad data") < printed.index("rank 0: lost the other ranks")
    (lost,) = re.findall(r"^rank \d: lost.*$", printed, re.MULTILINE)
    assert re.fullmatch(
        r"rank 0: lost the other ranks while training \(.*\); see the error of the rank that failed first;"
        " without one, torchrun was ended",
        lost,
    )
    assert "[rank0]" not in printed
    (run_dir,) = (tmp_path / "outputs").iterdir()
    assert [record["train/step"] for record in records(run_dir)] == list(range(1, STEPS + 1))
    assert_equal_runs(undisturbed, run_dir)


@contextmanager
def attempt(rank: int, *, count: int = 0, agent: str = "one") -> Iterator[None]:
    """Context of a rank in one attempt of a torchrun agent: after `count` restarts."""
    counted = patch.dict(os.environ, {"TORCHELASTIC_RESTART_COUNT": str(count)})
    with patch("trainer.distributed.torchrun.process_start", lambda _: agent), counted, importable_here(rank):
        yield


def test_a_restart_of_a_run_that_started_from_weights_continues_it(
    undisturbed: Path, tmp_path: Path, warm: Warm
) -> None:
    """Its averages start from the source, too; a restart takes both from the checkpoint, not from the source again."""
    (tmp_path / "faulty.py").write_text(TASK)
    start = (*RUN, f"init_from={undisturbed}:ema/0.9", "seed=1", "trainer.steps=6")
    warm(*start, "run_dir=whole", cwd=tmp_path, ranks=2)
    fault = ("task._target_=faulty.Faulty", "+task.faults=[raise]", "+task.ranks=[0,1]", "+task.step=5")
    again = (*start, *fault, "run_dir=run")
    warm(*again, cwd=tmp_path, ranks=2, within=attempt, code=1)
    printed = warm(*again, cwd=tmp_path, ranks=2, within=partial(attempt, count=1))
    assert re.search("continues from step [24]", printed), printed  # 4 is written beside the steps
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")
    metas = [json.loads((tmp_path / name / "meta.json").read_text()) for name in ("whole", "run")]
    assert metas[0]["init_from"] == metas[1]["init_from"]


def test_without_restarts_the_summary_of_torchrun_names_the_rank_that_failed_first(tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(TASK)
    fault = ("task._target_=faulty.Faulty", "+task.faults=[raise]", "+task.step=3")
    code, printed = finish(*RUN, *fault, "run_dir=run", cwd=tmp_path, restarts=0)
    assert code == 1
    cause = printed.rpartition("Root Cause (first observed failure)")[2]
    assert re.search(r"rank +: 1 \(", cause), printed
    assert "ValueError: rank 1 has bad data" in cause


def test_a_restart_begins_afresh_before_the_directory_and_before_the_first_checkpoint_were_made(
    undisturbed: Path, tmp_path: Path, warm: Warm
) -> None:
    """The first attempt makes no directory; the second one leaves records that the third must not repeat."""
    (tmp_path / "faulty.py").write_text(TASK)
    faults = ("+task.faults=[build,raise]", "+task.ranks=[0,1]", "+task.step=4", "trainer.save_every=0")
    run = (*RUN, "task._target_=faulty.Faulty", *faults, "run_dir=run")
    warm(*run, cwd=tmp_path, ranks=2, within=attempt, code=2)
    assert not (tmp_path / "run").exists()
    warm(*run, cwd=tmp_path, ranks=2, within=partial(attempt, count=1), code=1)
    assert [record["train/step"] for record in records(tmp_path / "run")] == [1, 2, 3]
    warm(*run, cwd=tmp_path, ranks=2, within=partial(attempt, count=2))
    losses = [[record["train/loss"] for record in records(path)] for path in (undisturbed, tmp_path / "run")]
    assert losses[0] == losses[1]
    assert (undisturbed / "pairs.jsonl").read_bytes() == (tmp_path / "run" / "pairs.jsonl").read_bytes()


def test_a_directory_of_another_job_is_refused_also_by_its_restarts(undisturbed: Path, warm: Warm) -> None:
    before = (undisturbed / "meta.json").read_bytes()
    assert json.loads(before)["torchrun_agents"]
    for count in (0, 1):
        other = partial(attempt, count=count, agent="another")
        printed = warm(*RUN, f"run_dir={undisturbed}", cwd=undisturbed.parent, ranks=2, within=other, code=2)
        assert printed.count(f"error: run_dir: {undisturbed} exists already") == 1, printed
    assert (undisturbed / "meta.json").read_bytes() == before
    assert "resumed" not in json.loads(before)


@contextmanager
def ending_rank_0_first(rank: int) -> Iterator[None]:
    """Context of a rank in which rank 1 sleeps until rank 0 has ended; no torchrun is there to end it then."""
    with patch("trainer.distributed.failures.END_TIMEOUT_S", 0.0), importable_here(rank):
        yield
    if rank == 0:
        Path("rank 0 has ended").touch()


@pytest.mark.parametrize(
    ("fault", "place", "seen"),
    [
        ("sleep in build", "agreeing that there was no error", "building the data and the task"),
        ("sleep in evaluation", "joining the values of an evaluation", "training"),
    ],
)
def test_a_time_out_names_the_place_and_the_missing_rank(
    tmp_path: Path, warm: Warm, fault: str, place: str, seen: str
) -> None:
    (tmp_path / "faulty.py").write_text(TASK)
    run = (*RUN, "sharding=ddp", "trainer.steps=2", f"trainer.timeout_s={TIMEOUT_OF_A_WAIT_S}", "run_dir=run")
    faulty = ("task._target_=faulty.Faulty", f"+task.faults=[{fault}]")
    printed = warm(*run, *faulty, cwd=tmp_path, ranks=2, within=ending_rank_0_first, code=1)
    (error,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    waited = f"waited {TIMEOUT_OF_A_WAIT_S} s (trainer.timeout_s)"
    assert error == f"error: rank 0: {waited} while {place} for rank 1 (last seen {seen})", printed
