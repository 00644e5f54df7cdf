"""What a sweep's records are taken for: data of declared types, machines that are gone, processes that are others."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import retry, status
from launch.sweeps.attempt import ATTEMPTS, attempt, keeper, read_attempts, running_on
from launch.sweeps.backends.local import Local
from launch.sweeps.config import LaunchConfig
from launch.sweeps.directory import SWEEP, Sweep
from launch.sweeps.expand import expand
from tests.sweeps import put
from trainer.errors import ConfigError


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ({"jobs": 3}, "'int' object is not iterable"),
        ({"experiment": ["a"]}, "experiment: expected str, got ['a']"),
        ({"targets": [1]}, "targets: expected list[str], got [1]"),
        ({"jobs": [{"number": "0"}]}, "number: expected int, got '0'"),
        ({"jobs": ["seed=0"]}, "expected keys and values, got 'seed=0'"),
        ({"jobs": [{"number": 0}]}, "run_dir"),
    ],
)
def test_a_sweep_record_of_other_types_is_refused_in_one_line(
    sweep: Sweep, damage: dict[str, Any], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((sweep.path / SWEEP).read_text())
    (sweep.path / SWEEP).write_text(json.dumps(content | damage))
    assert status.main(["sweep"]) == 2
    error = capsys.readouterr().err
    assert named in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_way_of_launching_of_other_types_is_refused(sweep: Sweep) -> None:
    sweep.launch["nodes"] = "two"
    with pytest.raises(ConfigError, match=r"sweep.json: launch: nodes: expected int, got 'two'"):
        sweep.launch_config()


@pytest.mark.parametrize("damage", ["{", "3", "[3]", '[{"host": 1}]', '[{"host": "a", "pid": 1}]'])
def test_a_damaged_record_of_attempts_is_that_runs_failure_alone(
    sweep: Sweep, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (sweep.run_dir(sweep.jobs[1]) / ATTEMPTS).write_text(damage)
    assert status.main(["sweep"]) == 0
    told = capsys.readouterr().out
    assert "3 runs: 2 pending, 1 failed" in told and f"1_seed_1/{ATTEMPTS}: expected the record" in told
    # It is not written over, either: whoever runs it again is told.
    with pytest.raises(ConfigError, match=ATTEMPTS):
        attempt(sweep.run_dir(sweep.jobs[1]), [sys.executable, "-c", ""])
    assert (sweep.run_dir(sweep.jobs[1]) / ATTEMPTS).read_text() == damage


def test_what_ran_on_a_machine_that_is_gone_is_run_again_when_the_user_says_so(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    put(sweep, 0, host="lost")
    put(sweep, 1, exit_code=0, ended="2026-01-01T00:00:01+00:00")
    assert status.main(["sweep"]) == 0
    told = capsys.readouterr().out
    assert "1 pending, 1 running, 1 done" in told and "launch.retry sweep gone=lost" in told
    assert retry.main(["sweep", "launch=print"]) == 0
    assert "0_seed_0" not in capsys.readouterr().out
    assert retry.main(["sweep", "launch=print", "gone=other"]) == 2
    assert "gone: expected one of lost, got 'other'" in capsys.readouterr().err
    assert retry.main(["sweep", "launch=print", "gone=lost"]) == 0
    assert "resume=" + str(sweep.run_dir(sweep.jobs[0])) in capsys.readouterr().out
    (record,) = read_attempts(sweep.run_dir(sweep.jobs[0]))
    assert record.exit_code is None and record.error == "its machine lost is gone"
    assert status.main(["sweep"]) == 0
    assert "its machine lost is gone" in capsys.readouterr().out


def test_a_process_that_was_given_the_keepers_number_later_is_sent_no_signal(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    run_dir = sweep.run_dir(sweep.jobs[0])
    code = f"""
import os
from launch.sweeps.attempt import keeper
from pathlib import Path
assert keeper(Path({str(run_dir)!r})) == os.getppid()
"""
    assert attempt(run_dir, [sys.executable, "-c", code]) == 0
    assert keeper(run_dir) is None  # it has ended
    stranger = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    try:
        put(sweep, 0, pid=stranger.pid, pid_started=1)
        Local(LaunchConfig())._signal(sweep, sweep.jobs[0])
        assert keeper(run_dir) is None
        put(sweep, 0, pid=os.getpid(), pid_started=None)
        assert keeper(run_dir) is None
        assert stranger.poll() is None
    finally:
        stranger.send_signal(signal.SIGKILL)
        assert stranger.wait(60) == -signal.SIGKILL
    put(sweep, 0, host="another")
    assert keeper(run_dir) is None and running_on(run_dir) == "another"


@pytest.mark.parametrize("path", ["a\nb", "${now:}"])
def test_a_sweeps_path_that_commands_would_misread_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = expand(["seed=0"])
    with pytest.raises(ConfigError, match=r"sweep_dir: expected a path without"):
        Sweep.create(path, plan.runs, plan.launch)
    assert list(tmp_path.iterdir()) == []


def test_torchrun_waits_for_the_save_as_long_as_the_run_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    local = Local(LaunchConfig(signal_delay_s=240))
    assert local._environment(0)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "240"


def test_a_run_on_another_machine_is_waited_for_and_one_held_by_hand_is_in_hand(sweep: Sweep) -> None:
    local = Local(LaunchConfig())
    assert local.held(sweep) == {}
    put(sweep, 0, host="another")
    assert not local._has_ended(sweep, sweep.jobs[0])
    put(sweep, 0, host="another", ended="2026-01-01T00:00:01+00:00", exit_code=0)
    assert local._has_ended(sweep, sweep.jobs[0])
    code = "import signal, sys; from trainer.rundir.directory import RunDir; hold = RunDir.open(sys.argv[1]).in_use()"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"{code}; hold.__enter__(); print(flush=True); signal.pause()",
            "sweep/1_seed_1",
        ],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"\n"
        assert local.held(sweep) == {1: "running"}
    finally:
        holder.kill()
        holder.wait(60)
        holder.stdout.close()
    assert local.held(sweep) == {}


def test_status_tells_whether_a_driver_works_and_retry_what_a_run_is_for(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status.main(["sweep"]) == 0
    assert "Start the remaining runs with:" in capsys.readouterr().out
    with sweep.driving():
        assert status.main(["sweep"]) == 0
        told = capsys.readouterr().out
        assert "Another launch command is using this sweep" in told and "launch.retry" not in told
    assert retry.main(["sweep/0_seed_0"]) == 2
    assert "this is a run, which python -m trainer resume=RUN_DIR continues" in capsys.readouterr().err
