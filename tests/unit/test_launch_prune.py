"""`launch.prune` deletes old checkpoints, and nothing that is needed or in use."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import prune
from tests.makers import make_run_dir
from tests.sweeps import make_sweep, put
from trainer.rundir.directory import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = make_run_dir(tmp_path / "run")
    for step in (10, 20, 30):
        folder = run.checkpoints / f"step-{step:08}"
        folder.mkdir(parents=True)
        (folder / "COMMIT.json").write_text("{}")
        (folder / "__0_0.distcp").write_bytes(bytes(1000))
    (run.checkpoints / "step-00000040").mkdir()  # never committed
    (run.checkpoints / "notes").mkdir()
    return run


def names(run: RunDir) -> set[str]:
    return {path.name for path in run.checkpoints.iterdir()}


def test_the_newest_are_kept_and_the_freed_bytes_are_printed(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune.main([str(run.path), "keep=2"]) == 0
    printed = "deleted 1 of 3 checkpoints (step-00000010), freed 1,002 bytes\n"
    assert capsys.readouterr().out == printed
    assert prune.main([str(run.path), "keep=1"]) == 0
    assert names(run) == {"step-00000030", "step-00000040", "notes"}
    assert prune.main([str(run.path), "keep=1"]) == 0
    assert capsys.readouterr().out.endswith("deleted 0 of 1 checkpoints, freed 0 bytes\n")


def test_the_checkpoint_of_the_best_evaluation_is_named_before_it_goes(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = ((5, 0.5), (10, 2.0), (20, 1.25), (30, 1.5))  # none was kept of step 5
    lines = [
        f'{{"train/step": {step}, "eval/live/loss": 3.0, "eval/ema/a/loss": {loss}}}\n'
        for step, loss in losses
    ]
    run.metrics_path.write_text("".join(lines))
    assert prune.main([str(run.path), "keep=2"]) == 0
    assert capsys.readouterr().out.startswith("deleted 1 of 3 checkpoints")
    assert prune.main([str(run.path), "keep=1"]) == 0
    told, done = capsys.readouterr().out.splitlines()
    assert told == "deletes the checkpoint of the best evaluation: step 20 (loss 1.25, ema/a)"
    assert done.startswith("deleted 1 of 2 checkpoints (step-00000020)")


@pytest.mark.parametrize("keep", ["keep=0", "keep=-1", "keep=", "keep=none"])
def test_keep_is_at_least_one(run: RunDir, keep: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert prune.main([str(run.path), keep]) == 2
    assert capsys.readouterr().err.startswith("error: keep: expected a whole number of at least 1")
    assert prune.main([str(run.path)]) == 2
    assert len(names(run)) == 5


def test_a_run_that_a_process_writes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = make_sweep()
    put(sweep, 0, host="another")  # still running there, as far as its record shows
    assert prune.main([str(sweep.run_dir(sweep.jobs[0])), "keep=1"]) == 2
    assert "is in use by a run on another" in capsys.readouterr().err


def test_a_session_in_the_directory_is_not_disturbed(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; from trainer.rundir.directory import RunDir\nwith RunDir.open(sys.argv[1]).in_use():"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{code} print(flush=True); sys.stdin.read()", str(run.path)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"\n"
        assert prune.main([str(run.path), "keep=1"]) == 2
        assert "is in use by a run on" in capsys.readouterr().err
        holder.kill()
    assert len(names(run)) == 5
    assert prune.main([str(run.path), "keep=1"]) == 0


def test_a_directory_that_cannot_be_written_is_named_by_the_argument(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Path, flags: int) -> int:
        raise OSError(*((errno.EROFS, "Read-only file system") if flags & os.O_CREAT else (errno.ENOENT, "")))

    monkeypatch.setattr("trainer.rundir.lock.open_own", read_only)
    assert prune.main([str(run.path), "keep=1"]) == 2
    assert capsys.readouterr().err == f"error: RUN_DIR: {run.path} cannot be written: Read-only file system\n"
    assert len(names(run)) == 5
