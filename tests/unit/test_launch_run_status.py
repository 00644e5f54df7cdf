"""`launch.status` of one run, from directories made by hand: the figures shown are those that were written."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import status
from tests.makers import make_run_dir, refusal_of
from tests.sweeps import make_sweep
from trainer.checkpoint.continuity import check_resumable
from trainer.distributed.torchrun import process_start
from trainer.rundir.directory import RunDir
from trainer.rundir.lock import take_file_lock

CONFIG = "trainer:\n  steps: 100\n"
HOLDS = """
import signal, sys
from trainer.rundir.directory import RunDir
with RunDir.open(sys.argv[1]).in_use():
    print(flush=True)
    signal.pause()
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.chdir(tmp_path)
    run = make_run_dir("run", CONFIG, primary_metric="accuracy", higher_is_better=["accuracy"])
    (run.checkpoints / "step-00000020").mkdir(parents=True)
    return run


def write(run: RunDir, *records: dict[str, float | None], end: str = "") -> None:
    run.metrics_path.write_text("".join(json.dumps(record) + "\n" for record in records) + end)
    then = time.time() - 3661
    os.utime(run.metrics_path, (then, then))


TRAIN: dict[str, float | None] = {
    "train/step": 40,
    "train/loss": 1.5,
    "train/lr": 0.001,
    "throughput/samples_per_s": 64.0,
    "time/step_s": 0.5,
    "ema/0.9/rel_l2": 0.01,
    "ema/0.99/rel_l2": 0.25,
}
EVALUATION: dict[str, float | None] = {
    "train/step": 20,
    "eval/live/accuracy": 0.5,
    "eval/ema/0.9/accuracy": 0.4,
    "eval/ema/0.99/accuracy": 0.75,
    "eval/gap/0.99/accuracy": -0.25,
    "eval/gap/0.99/accuracy_se": None,
}


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert status.main(["run"]) == 0
    return capsys.readouterr().out.splitlines()


def test_no_average_is_shown_as_the_best_by_a_metric_without_direction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    facts = {"primary_metric": "accuracy", "higher_is_better": [], "direction_undeclared": ["accuracy"]}
    write(make_run_dir("run", CONFIG, **facts), EVALUATION, TRAIN)
    text = "\n".join(shown(capsys))
    assert "eval live 0.5000" in text and "best" not in text


def test_a_dead_run_shows_its_last_values_and_how_to_go_on(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(capsys)[0] == "run: not started, step 0/100"
    write(run, EVALUATION, TRAIN, end='{"train/st')
    first, *rest = shown(capsys)
    assert first.startswith("run: not running (no process holds it), step 40/100, last record 1:01:0")
    assert rest == [
        "  loss 1.5000  lr 0.001  64 samples/s",
        "  eval live 0.5000  best EMA 0.99 0.7500  gap -0.2500  rel_l2 2.50e-01  (evaluated at step 20)",
        "Continue it with:",
        "  python -m trainer resume=run",
    ]


def commit(run: RunDir, step: int) -> None:
    folder = run.checkpoints / f"step-{step:08}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "COMMIT.json").touch()


def test_a_run_that_saved_where_it_ended_is_stopped_and_its_saved_step_is_shown(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    write(run, EVALUATION, TRAIN)
    commit(run, 20)
    first, *_, command = shown(capsys)
    assert first.startswith(
        "run: not running (no process holds it), step 40/100, saved at step 20, last record"
    )
    commit(run, 45)  # at the signal, five steps behind the last record
    first, *_, command = shown(capsys)
    assert first.startswith("run: stopped, step 40/100, saved at step 45, last record")
    assert command == "  python -m trainer resume=run"


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ("model: {_target_: models.gpt.GPT}", False),
        ("model: {_target_: net.Net}", True),
        ("callbacks: {diary: {_target_: my_calls.Diary}}", True),
    ],
)
def test_that_own_code_must_be_allowed_is_said_without_what_to_allow(
    own: str, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run_dir("run", f"{CONFIG}{own}\n", primary_metric="loss", higher_is_better=[])
    *_, title, command = shown(capsys)
    note = " (the run's own code needs allow_targets= too; the refusal has the words)"
    assert title == f"Continue it with{note if told else ''}:"
    assert command == "  python -m trainer resume=run"


def test_a_folder_of_runs_and_sweeps_shows_each(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(run, TRAIN)
    make_run_dir("outputs/other", CONFIG, primary_metric="accuracy")
    make_sweep("trainer.steps=5").path.rename(tmp_path / "outputs" / "seeds")
    assert status.main(["outputs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("outputs")] == [
        "outputs/other: not started, step 0/100",
        "outputs/seeds: 3 runs: 3 pending",
    ]
    assert status.main(["."]) == 0  # a folder of such folders
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if line[0] in "or"] == [
        "outputs/other",
        "outputs/seeds",
        "run",
    ]


def test_a_run_that_ended_before_its_first_checkpoint_is_started_anew(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run.checkpoints)
    assert shown(capsys)[-1] == "  python -m trainer resume=run"  # without a record
    write(run, TRAIN)
    lines = shown(capsys)
    assert lines[-1] == "It has no checkpoint to continue from; start a new run."
    assert not any("resume=" in line for line in lines)
    assert "has records and no checkpoint" in refusal_of(
        check_resumable, RunDir.open(run.path), restarted=False, accept=False
    )


def test_an_evaluation_is_found_however_far_back(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    write(run, EVALUATION, *({**TRAIN, "train/step": step} for step in range(21, 2021)))
    assert run.metrics_path.stat().st_size > 1 << 18
    assert any("(evaluated at step 20)" in line for line in shown(capsys))


def test_a_running_one_is_told_from_a_dead_one_by_its_lock(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    write(run, TRAIN)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(run.path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"\n"
        first, *rest = shown(capsys)
        # 60 steps of half a second are left.
        assert first.startswith(f"run: running (process {holder.pid} on ")
        assert ", step 40/100, 0:00:30 left, " in first
        assert not any("resume=" in line for line in rest)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait(60)
        holder.stdout.close()
    assert shown(capsys)[0].startswith("run: not running (no process holds it), ")


def test_between_two_starts_of_its_ranks_by_torchrun_a_run_is_not_to_be_carried_on(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process stands for the torchrun: it started the rank, and outlives it."""
    write(run, TRAIN)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    rank = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(run.path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert rank.stdout is not None
    try:
        assert rank.stdout.readline() == b"\n"
        assert shown(capsys)[0].startswith(f"run: running (process {rank.pid} on ")
    finally:
        rank.kill()
        rank.wait(60)
        rank.stdout.close()
    first, *rest = shown(capsys)
    assert first.startswith(
        f"run: no rank is running; its torchrun (process {os.getpid()} on {socket.gethostname()}) is starting,"
        " restarting or ending the ranks, step 40/100, last record 1:01:0"
    )
    assert not any("resume=" in line for line in rest)
    # Another process that was given that torchrun's number since is none of it.
    lock = run.path / "run.lock"
    lock.write_text(lock.read_text().replace(str(process_start(os.getpid())), "1"))
    assert shown(capsys)[0].startswith("run: not running (no process holds it), ")


def test_an_attempt_that_goes_on_without_a_rank_is_told(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    descriptor = take_file_lock(run.path / "attempt.lock")
    assert descriptor is not None
    assert shown(capsys)[0].startswith(
        "run: no rank is running; its attempt is starting, restarting or ending the ranks, "
    )
    os.close(descriptor)
    assert shown(capsys)[0].startswith("run: not started, ")


def test_a_run_of_many_processes_is_carried_on_by_as_many(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    write(run, TRAIN)
    run.update_meta(world_size=4)
    assert shown(capsys)[-1] == "  torchrun --nproc-per-node=4 -m trainer resume=run"
    run.update_meta(nodes=2)
    assert shown(capsys)[-1] == (
        "  torchrun --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=HOST:29400 --rdzv-id=JOB"
        " -m trainer resume=run  # on each of the 2 nodes; HOST: one of them, JOB: any name"
    )
    run.update_meta(nodes="many")
    assert status.main(["run"]) == 2
    assert "meta.json: expected world_size and nodes" in capsys.readouterr().err


def test_a_run_is_done_when_its_report_is_there(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    write(run, {**TRAIN, "train/step": 100})
    assert shown(capsys)[0].startswith("run: not running (no process holds it), step 100/100")
    run.report.mkdir()
    (run.report / "index.html").touch()
    assert shown(capsys)[0].startswith("run: done, step 100/100")


def test_what_is_no_run_and_no_sweep_is_refused(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    write(run, TRAIN, end="[]\n{}\n")
    for argument, named in (
        ("nowhere", "nowhere: no such directory; expected a sweep or a run"),
        ("run", "metrics.jsonl: expected"),
    ):
        assert status.main([argument]) == 2
        error = capsys.readouterr().err
        assert named in error and error.count("\n") == 1
    shutil.rmtree(run.path / "config.yaml", ignore_errors=True)
    run.config_path.write_text("trainer: 3\n")
    assert status.main(["run"]) == 2
    assert "was changed after the run started" in capsys.readouterr().err
