"""Run directories, checkpoints, a sweep and a queued Slurm job of the first release go on loading.

Commit 699b846 wrote `tests/fixtures/first_release`: a run of 4 steps by one process, the same one under FSDP2 by
two, a sweep of two runs of which the second never started, and the pickle of a job that waits in Slurm's queue.
`resumed_to_step_6.json` holds what that commit recorded at step 6 after it resumed the two runs.
"""

import json
import pickle
import shutil
from pathlib import Path

import pytest

from launch import compare, evaluate, export, status
from launch.sweeps.backends.slurm import Task
from tests.integration.commands import Warm, command, deterministic, environment, records, run_to_end

FIXTURES = Path(__file__).parents[1] / "fixtures" / "first_release"
EXPECTED = json.loads((FIXTURES / "resumed_to_step_6.json").read_text())


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A copy of the directory that may be written to; its sweep was started there."""
    copy = shutil.copytree(FIXTURES, tmp_path / "made")
    sweep = copy / "sweep" / "sweep.json"
    sweep.write_text(json.dumps(json.loads(sweep.read_text()) | {"cwd": str(copy)}))
    return copy


@pytest.mark.parametrize(("name", "processes"), [("run_1_rank", 1), ("run_2_ranks", 2), ("run_2_ranks", 1)])
def test_a_run_is_resumed_and_goes_on_as_the_first_release_did(
    name: str, processes: int, made: Path, warm: Warm
) -> None:
    other = ["sharding=none"] if name == "run_2_ranks" and processes == 1 else []
    warm(f"resume={made / name}", "trainer.steps=6", *other, cwd=made, ranks=processes)
    last = deterministic(records(made / name)[-1])
    assert last == pytest.approx(EXPECTED[name], rel=1e-4, abs=1e-6)


def test_a_run_is_compared_evaluated_and_exported(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    assert compare.main(["run_1_rank"]) == 0
    assert "EMA 0.99" in capsys.readouterr().out
    assert evaluate.main(["run_2_ranks"]) == 0
    (result,) = (made / "run_2_ranks" / "evaluations").glob("*.json")
    recorded = records(made / "run_2_ranks")[-1]
    values = json.loads(result.read_text())
    for key in ("eval/live/loss", "eval/ema/0.99/loss"):
        assert find(values, key) == pytest.approx(recorded[key], rel=1e-6)
    assert export.main(["run_2_ranks", "weights=ema/0.99", "out=ema.safetensors"]) == 0
    assert (made / "ema.safetensors").stat().st_size > 4 * 2900  # of 4 bytes: the tied embedding once


def find(values: object, key: str) -> float:
    """The value of a key at any depth of a JSON document."""
    if isinstance(values, dict):
        if key in values:
            return float(values[key])
        for inner in values.values():
            try:
                return find(inner, key)
            except KeyError:
                continue
    raise KeyError(key)


def test_a_sweep_shows_its_status_and_retries_what_never_started(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    assert status.main(["sweep"]) == 0
    assert "1 done" in capsys.readouterr().out
    run_to_end(command("sweep", module="launch.retry"), cwd=made)
    assert records(made / "sweep" / "1_seed_2")[-1]["train/step"] == 4
    assert status.main(["sweep"]) == 0
    assert "2 done" in capsys.readouterr().out


def test_a_job_that_was_queued_before_the_move_trains_its_run(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pickle names `launch.sweeps.slurm`; without that name the job would die when its turn comes."""
    job = pickle.loads((made / "slurm_job_submitted.pkl").read_bytes())
    task = job.function
    assert isinstance(task, Task)
    assert str(task.run_dir) == "sweep/1_seed_2"
    task.command = command(f"resume={made / task.run_dir}")
    for name, value in environment({"SLURM_JOB_ID": "7"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(made)
    assert task() == 0
    assert records(made / task.run_dir)[-1]["train/step"] == 4
