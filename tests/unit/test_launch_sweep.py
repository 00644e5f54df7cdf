"""Attempts on record, states derived from disk, and locks. Exit codes are those of a shell: 128 + signal."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch import retry, status
from launch.sweeps.attempt import EXIT_TAKEN, LOCK, Attempt, attempt, read_attempts
from launch.sweeps.backends.gpus import visible_gpus
from launch.sweeps.backends.local import Local
from launch.sweeps.config import LaunchConfig
from launch.sweeps.directory import Sweep
from launch.sweeps.expand import expand
from launch.sweeps.outcome import conclude, counts, job_lines
from tests.sweeps import make_sweep, put
from trainer.errors import ConfigError
from trainer.rundir.lock import is_file_locked, take_file_lock
from trainer.rundir.records import last_step


def run(run_dir: Path, code: str) -> Attempt:
    attempt(run_dir, [sys.executable, "-c", code])
    return read_attempts(run_dir)[-1]


def test_an_attempt_is_on_record_with_its_exit_code_and_the_line_that_says_why(tmp_path: Path):
    done = run(tmp_path, "print('fine')")
    assert (done.exit_code, done.error, done.stopped) == (0, None, False)
    assert done.ended is not None and done.host == socket.gethostname()
    raised = run(tmp_path, "print('error: of before?'.upper()); raise ValueError('too wide')")
    assert (raised.exit_code, raised.error) == (1, "ValueError: too wide")
    refused = run(tmp_path, "print('error: ema.decay: expected less'); print('later'); raise SystemExit(2)")
    assert (refused.exit_code, refused.error) == (2, "ema.decay: expected less")
    killed = run(tmp_path, "import os; os.kill(os.getpid(), 9)")
    assert (killed.exit_code, killed.error) == (137, "killed by SIGKILL")
    assert len(read_attempts(tmp_path)) == 4
    assert (tmp_path / "output.log").read_text().count("fine") == 1


def test_an_error_of_an_earlier_attempt_is_not_told_again(tmp_path: Path):
    run(tmp_path, "print('error: old'); raise SystemExit(2)")
    assert run(tmp_path, "print('last words'); raise SystemExit(3)").error == "last words"


def test_torchruns_own_exception_does_not_hide_the_ranks(tmp_path: Path):
    lines = (
        "[rank1]: ValueError: too wide",
        "torch.distributed.elastic.errors.ChildFailedError: trainer FAILED",
    )
    assert (
        run(tmp_path, f"print({chr(10).join(lines)!r}); raise SystemExit(1)").error == "ValueError: too wide"
    )


def start_attempt(run_dir: Path, code: str) -> subprocess.Popen[bytes]:
    """An attempt that has written `ready` and waits for a signal."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.sweeps.attempt", str(run_dir), sys.executable, "-c", code]
    )
    until = time.monotonic() + 60
    while not (run_dir / "ready").exists():
        assert process.poll() is None and time.monotonic() < until
    return process


WAITS = (
    "import signal, pathlib, sys; signal.signal(12, lambda *_: sys.exit(75)); "
    "pathlib.Path({!r}).touch(); signal.pause()"
)


def test_a_signal_to_the_keeper_reaches_the_command_and_the_stop_is_on_record(tmp_path: Path):
    process = start_attempt(tmp_path, WAITS.format(str(tmp_path / "ready")))
    assert is_file_locked(tmp_path / LOCK)
    process.terminate()
    assert process.wait(60) == 75
    (record,) = read_attempts(tmp_path)
    assert (record.exit_code, record.stopped) == (75, True)
    assert not is_file_locked(tmp_path / LOCK)


def test_two_attempts_never_meet_in_a_directory_even_when_the_keeper_is_killed(tmp_path: Path):
    code = WAITS.format(str(tmp_path / "ready")).replace(
        "signal.pause()", "print(flush=True); signal.pause()"
    )
    code = f"import os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); {code}"
    process = start_attempt(tmp_path, code)
    try:
        process.kill()
        process.wait(60)
        assert is_file_locked(tmp_path / LOCK), "the command holds on to it"
        assert attempt(tmp_path, [sys.executable, "-c", ""]) == EXIT_TAKEN
        assert len(read_attempts(tmp_path)) == 1
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def state(sweep: Sweep, number: int = 0) -> tuple[str, str | None]:
    sweep.observe(Local(LaunchConfig()).held(sweep))
    return sweep.jobs[number].state, sweep.jobs[number].error


def test_states_are_told_from_what_lies_on_disk(sweep: Sweep):
    assert state(sweep) == ("pending", None)
    put(sweep, 0, exit_code=0)
    assert state(sweep) == ("done", "metrics.jsonl is missing")
    (sweep.run_dir(sweep.jobs[0]) / "metrics.jsonl").touch()
    assert state(sweep) == ("done", None)
    put(sweep, 0, exit_code=1, error="ValueError: too wide")
    assert state(sweep) == ("failed", "ValueError: too wide")
    put(sweep, 0, exit_code=75, stopped=True)
    assert state(sweep) == ("pending", "stopped at step 0")
    put(sweep, 0, exit_code=1, stopped=True)  # torchrun's own code after a signal
    assert state(sweep) == ("pending", "stopped at step 0")
    checkpoint = sweep.run_dir(sweep.jobs[0]) / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMMIT.json").touch()
    assert state(sweep) == ("pending", "stopped, saved at step 3")
    assert counts(sweep.jobs) == "3 runs: 2 pending, 1 stopped"
    assert job_lines(sweep)[0].startswith("stopped  0_seed_0 ")
    put(sweep, 0)
    assert state(sweep)[0] == "failed" and "left no exit code" in str(state(sweep)[1])
    put(sweep, 0, host="another")
    assert state(sweep) == ("running", None)
    put(sweep, 0)
    descriptor = take_file_lock(sweep.run_dir(sweep.jobs[0]) / LOCK)
    assert descriptor is not None and state(sweep) == ("running", None)
    os.close(descriptor)


def test_a_run_that_reached_its_report_is_done_whatever_its_exit_was(sweep: Sweep):
    run_dir = sweep.run_dir(sweep.jobs[0])
    put(sweep, 0)
    (run_dir / "metrics.jsonl").write_text('{"train/step": 10}\n{"train/st')
    assert last_step(run_dir / "metrics.jsonl") == 10 and state(sweep)[0] == "failed"
    (run_dir / "report").mkdir()
    (run_dir / "report" / "index.html").touch()
    assert state(sweep) == ("done", None)
    (run_dir / "metrics.jsonl").write_text('{"train/step": 9}\n')
    assert state(sweep)[0] == "failed"


def test_a_sweep_is_found_again_as_it_was_made_also_in_another_place(sweep: Sweep, tmp_path: Path):
    found = Sweep.open(sweep.path)
    assert found == sweep
    assert [job.run_dir for job in found.jobs] == ["0_seed_0", "1_seed_1", "2_seed_2"]
    assert found.launch_config() == LaunchConfig(slots=1)
    shutil.move(sweep.path, tmp_path / "moved")
    moved = Sweep.open(tmp_path / "moved")
    assert moved.run_dir(moved.jobs[2]).is_dir()


def test_a_directory_that_exists_is_refused_and_a_half_made_one_is_removed(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
):
    plan = expand(["-m", "seed=0,1"])
    with pytest.raises(ConfigError, match=r"sweep_dir: .* exists already"):
        Sweep.create("sweep", plan.runs, plan.launch)
    assert Sweep.open("sweep") == sweep

    def fails(self: Sweep) -> None:
        raise ConfigError("no space")

    monkeypatch.setattr(Sweep, "save", fails)
    with pytest.raises(ConfigError, match="no space"):
        Sweep.create("other", plan.runs, plan.launch)
    assert not Path("other").exists()


@pytest.mark.parametrize(
    "moment", ["trainer.rundir.directory.RunDir.create", "launch.sweeps.directory.Sweep.save"]
)
def test_a_sweep_that_is_killed_while_it_is_made_can_be_made_again(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, moment: str
):
    plan = expand(["-m", "seed=0,1"])
    with monkeypatch.context() as patch:
        patch.setattr(moment, lambda *_, **__: os._exit(9))
        if (pid := os.fork()) == 0:
            try:
                Sweep.create("other", plan.runs, plan.launch)
            finally:
                os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert not Path("other").exists()
    made = Sweep.create("other", plan.runs, plan.launch)
    assert Sweep.open("other") == made and made.run_dir(made.jobs[1]).is_dir()


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "..", "a/b", ""])
def test_a_record_that_leads_elsewhere_is_refused(sweep: Sweep, name: str):
    content = json.loads((sweep.path / "sweep.json").read_text())
    content["jobs"][1]["run_dir"] = name
    (sweep.path / "sweep.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="expected a name under"):
        Sweep.open(sweep.path)


def test_one_driver_at_a_time(sweep: Sweep, capsys: pytest.CaptureFixture[str]):
    descriptor = take_file_lock(sweep.path / "sweep.lock")
    assert descriptor is not None
    assert retry.main(["sweep"]) == 2
    assert "another launch command is using this sweep" in capsys.readouterr().err
    os.close(descriptor)


def test_status_tells_each_job_and_brings_the_record_up_to_date(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
):
    put(sweep, 0, exit_code=0)
    put(sweep, 1, exit_code=1, error="ValueError: too wide")
    assert status.main(["sweep"]) == 0
    first, *lines, _, again = capsys.readouterr().out.splitlines()
    assert first == "sweep: 3 runs: 1 pending, 1 done, 1 failed"
    assert [line.split()[:2] for line in lines] == [
        ["done", "0_seed_0"],
        ["failed", "1_seed_1"],
        ["pending", "2_seed_2"],
    ]
    assert lines[1].endswith("ValueError: too wide")
    assert again.strip() == "python -m launch.retry sweep"
    assert [job.state for job in Sweep.open("sweep").jobs] == ["done", "failed", "pending"]


def test_status_advises_no_retry_without_the_directory_of_a_run(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
):
    put(sweep, 0, exit_code=0)
    lost = sweep.run_dir(sweep.jobs[2])
    shutil.rmtree(lost)
    assert status.main(["sweep"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("metrics.jsonl is missing")
    assert lines[-1].startswith(f"The remaining runs cannot be started: {lost / 'config.yaml'} is missing: ")


def full(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_status_is_shown_on_a_full_disk(
    sweep: Sweep, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    put(sweep, 0, exit_code=0)
    before = (sweep.path / "sweep.json").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    assert status.main(["sweep"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("sweep: 3 runs: 2 pending, 1 done")
    assert (
        printed.err == f"warning: {sweep.path / 'sweep.json'}: cannot be written: No space left on device\n"
    )
    assert (sweep.path / "sweep.json").read_bytes() == before


def test_a_driver_on_a_full_disk_lets_its_runs_end_and_starts_no_further_one(
    sweep: Sweep, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    started = []

    class Ended:
        """A run that ends at once, and with it the room on the disk."""

        returncode = 0

        def __init__(self, command: list[str], **_: Any) -> None:
            started.append(command)
            monkeypatch.setattr(os, "fsync", full)

        def poll(self) -> int:
            return 0

    monkeypatch.setattr("launch.sweeps.backends.local.subprocess.Popen", Ended)
    backend = Local(LaunchConfig(name="local", slots=1))
    backend.check("cpu")
    assert not backend.start(sweep, sweep.jobs, [])
    assert conclude(sweep, backend, stopped=False, allowed=[]) == 1
    printed = capsys.readouterr()
    assert len(started) == 1 and "python -m launch.retry sweep" in printed.out
    line = f"warning: {sweep.path / 'sweep.json'}: cannot be written: No space left on device"
    assert set(printed.err.splitlines()) == {line}


@pytest.mark.parametrize("higher", [[], None])
def test_what_follows_a_sweep_is_the_export_of_the_best_run_if_it_can_be_ranked(
    sweep: Sweep, capsys: pytest.CaptureFixture[str], higher: list[str] | None
):
    meta = {"primary_metric": "loss", "higher_is_better": higher}
    meta |= {} if higher is not None else {"direction_undeclared": ["loss"]}
    for job in sweep.jobs:
        record = {"train/step": 10, "eval/live/loss": 2.0, "eval/ema/0.9/loss": 1.5 + job.number / 100}
        record |= {"eval/gap/0.9/loss": 0.5 - job.number / 100, "eval/gap/0.9/loss_se": 0.01}
        (sweep.run_dir(job) / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        (sweep.run_dir(job) / "meta.json").write_text(json.dumps(meta))
        put(sweep, job.number, exit_code=0)
    assert conclude(sweep, Local(LaunchConfig(name="local", slots=1)), stopped=False, allowed=[]) == 0
    following = [line.strip() for line in capsys.readouterr().out.partition("Next:\n")[2].splitlines()]
    commands = [line for line in following if "python" in line]
    export = ["python -m launch.export sweep/0_seed_0 weights=ema/0.9 out=0_seed_0.safetensors"]
    assert commands == [*(export if higher is not None else []), "python -m launch.compare sweep"]
    if higher is not None:  # the model of a stranger's sweep is not to be trusted by copying a line
        for job in sweep.jobs:
            (sweep.run_dir(job) / "config.yaml").write_text("model: {_target_: net.Net}\n")
        for allowed, note in (([], " (the run's own code needs allow_targets= too; "), (["net."], ":")):
            conclude(sweep, Local(LaunchConfig(name="local", slots=1)), stopped=False, allowed=allowed)
            assert f"\nNext{note}" in capsys.readouterr().out


def test_retry_prints_exactly_what_is_missing(sweep: Sweep, capsys: pytest.CaptureFixture[str]):
    put(sweep, 0, exit_code=0)
    put(sweep, 1, exit_code=1, error="ValueError: too wide")
    assert retry.main(["sweep", "launch=print"]) == 0
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python")]
    assert commands == [f"python -m trainer resume={sweep.path}/{name}" for name in ("1_seed_1", "2_seed_2")]


def test_the_command_that_trusts_repeats_how_the_runs_were_to_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Without the typed launch=print, the pasted command would start the runs."""
    monkeypatch.chdir(tmp_path)
    make_sweep("model._target_=net.Net")
    typed = ["launch=print", "launch.format=trainjob"]
    assert retry.main(["sweep", *typed]) == 2
    again = capsys.readouterr().err.rpartition("python -m launch.retry ")[2].split()
    assert sorted(again) == ["'allow_targets=[net.Net]'", *sorted(typed), "sweep"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere"], "nowhere: expected a sweep's directory"),
        (["sweep", "sweep"], "expected one sweep directory"),
        (["sweep", "bogus=1"], "bogus: unknown key; expected allow_targets, gone, launch, launch.name, "),
        (["sweep", "launch.slots=0"], "launch.slots"),
        (["sweep", "launch.processes_per_node=2"], "sharding.strategy: 'none' is for one process"),
    ],
)
def test_retry_refuses_bad_input_in_one_line(
    sweep: Sweep, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
):
    before = (sweep.path / "sweep.json").read_bytes()
    assert retry.main(arguments) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert (sweep.path / "sweep.json").read_bytes() == before


def test_gpus_are_dealt_to_slots_and_shared_in_turn_when_there_are_too_few(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,GPU-a")
    assert visible_gpus() == ["4", "5", "6", "7", "GPU-a"]

    def deal(**settings: Any) -> list[str]:
        local = Local(LaunchConfig(**settings))
        local.check("auto")
        return [",".join(local._slot_gpus(slot)) for slot in range(local._slots)]

    assert deal(processes_per_node=2) == ["4,5", "6,7"]
    assert deal() == ["4", "5", "6", "7", "GPU-a"]
    assert deal(slots=3, processes_per_node=2) == ["4,5", "6,7", "GPU-a,4"]
    with pytest.raises(ConfigError, match=r"processes_per_node: expected at most the 5 GPUs"):
        deal(processes_per_node=6)


def test_without_gpus_the_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for settings, slots, threads in (
        ({}, 8, "1"),
        ({"slots": 2}, 2, "4"),
        ({"processes_per_node": 4}, 2, "1"),
    ):
        local = Local(LaunchConfig(**settings))  # type: ignore[arg-type]
        local.check("cpu")
        assert local._slots == slots
        environment = local._environment([])
        assert environment["OMP_NUM_THREADS"] == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's own
    assert local._environment([])["OMP_NUM_THREADS"] == "3"
