"""Sweeps of one user share GPUs by locks, with GPUs that are names only."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from launch.sweeps.attempt import LOCK, read_attempts
from launch.sweeps.backends import local as backend
from launch.sweeps.backends.gpus import lock_folder, release, take_gpus, visible_gpus
from launch.sweeps.backends.local import Local
from launch.sweeps.config import LaunchConfig
from launch.sweeps.directory import Sweep
from launch.sweeps.expand import expand
from tests.integration.commands import until
from tests.makers import refusal_of
from trainer.rundir.lock import is_file_locked


@pytest.fixture(autouse=True)
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-a")


def test_a_gpu_is_taken_by_one_run_until_its_processes_have_ended() -> None:
    first = take_gpus(["0", "GPU-a"], 1)
    second = take_gpus(["0", "GPU-a"], 1)
    assert first is not None and second is not None and (list(first), list(second)) == (["0"], ["GPU-a"])
    assert take_gpus(["0", "GPU-a"], 1) is None
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=list(first.values())) as child:
        release(first)
        assert take_gpus(["0", "GPU-a"], 1) is None, "the child holds it"
        release(second)
        assert take_gpus(["0", "GPU-a"], 2) is None, "nothing is kept of a pair that is not free"
        child.kill()
    both = take_gpus(["0", "GPU-a"], 2)
    assert both is not None
    release(both)


def test_a_folder_of_another_place_is_refused(tmp_path: Path) -> None:
    lock_folder().rmdir()
    (tmp_path / f"polyak-gpus-{os.getuid()}").symlink_to(tmp_path)
    assert "this is a link" in refusal_of(take_gpus, ["0"], 1)
    assert "this is a link" in refusal_of(Local(LaunchConfig()).check, "auto")


def test_a_sweep_with_a_runtime_folder_sees_the_locks_of_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A logout deletes that folder, and cron does not set its variable."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    (tmp_path / "runtime").mkdir()
    first = take_gpus(["0"], 1)
    assert first is not None
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert take_gpus(["0"], 1) is None
    release(first)


@pytest.mark.parametrize(("variable", "expected"), [("-1", []), ("", []), ("3, GPU-a,-1,0", ["3", "GPU-a"])])
def test_gpus_behind_a_negative_number_are_hidden(
    monkeypatch: pytest.MonkeyPatch, variable: str, expected: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_gpus() == expected


def start(name: str, monkeypatch: pytest.MonkeyPatch, *, slots: int | None = None) -> tuple[Local, Sweep]:
    """A sweep of two runs that print their GPU, and end at a signal."""
    code = "import os, signal; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); signal.pause()"
    monkeypatch.setattr(backend, "run_command", lambda *_: [sys.executable, "-c", code])
    plan = expand(["-m", "seed=0,1", "trainer.steps=10"])
    launch = LaunchConfig(slots=slots)
    local = Local(launch)
    local.check("auto")
    return local, Sweep.create(name, plan.runs, launch)


def end(sweep: Sweep, number: int) -> None:
    os.kill(read_attempts(sweep.run_dir(sweep.jobs[number]))[-1].pid, signal.SIGTERM)


def test_two_sweeps_never_use_one_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, first = start("one", monkeypatch, slots=1)
    two, second = start("two", monkeypatch)
    assert one._start(first, first.jobs[0], [])
    assert two._start(second, second.jobs[0], [])
    assert not two._start(second, second.jobs[1], []) and not two._start(second, second.jobs[1], [])
    printed = capsys.readouterr().out
    assert "slot 0, GPU 0)" in printed and "slot 0, GPU GPU-a)" in printed
    assert printed.count("waiting for GPUs") == 1
    logs = [sweep.run_dir(sweep.jobs[0]) / "output.log" for sweep in (first, second)]
    until(lambda: all(log.exists() and log.read_text() for log in logs), lambda: logs)
    assert [log.read_text() for log in logs] == ["0\n", "GPU-a\n"]
    for local, sweep in ((one, first), (two, second)):
        end(sweep, 0)
        local._started[0].wait(30)
        lock = sweep.run_dir(sweep.jobs[0]) / LOCK
        until(lambda lock=lock: not is_file_locked(lock), lambda lock=lock: lock)
    two._reap(second)
    assert two._start(second, second.jobs[1], [])
    assert "slot 0, GPU 0)" in capsys.readouterr().out
    log = second.run_dir(second.jobs[1]) / "output.log"
    until(log.exists, lambda: log)
    end(second, 1)
    two._started[1].wait(30)


def test_runs_that_share_gpus_by_choice_take_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    assert take_gpus(["0", "GPU-a"], 2) is not None
    local, _ = start("shared", monkeypatch, slots=3)
    assert not local._locks_gpus
