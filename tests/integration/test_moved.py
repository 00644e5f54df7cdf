"""A run directory that is moved, deleted or replaced under its run: the run ends in one line and makes nothing."""

import os
from pathlib import Path

import pytest

from tests.integration.commands import Warm, importable_here, records
from tests.makers import TINY_GPT

LOGGER = """
import os
import shutil


class Mover:
    def __init__(self, run_dir, how="", step=0):
        self.run_dir, self.how, self.step = run_dir, how, step

    def log(self, step, metrics):
        if step != self.step or self.run_dir.name != "run":
            return
        if self.how == "records":
            (self.run_dir / "metrics.jsonl").unlink()
        elif self.how == "delete":
            while self.run_dir.exists():  # a thread may be writing a checkpoint in it
                shutil.rmtree(self.run_dir, ignore_errors=True)
        else:
            self.run_dir.rename(self.run_dir.with_name("moved"))
        if self.how == "replace":
            self.run_dir.mkdir()

    def image(self, step, name, path): ...
    def table(self, step, name, headers, rows): ...
    def close(self, summary, exit_code): ...
"""


@pytest.mark.parametrize(
    ("how", "step", "count"),
    [("move", 3, 2), ("replace", 4, 2), ("delete", 4, 1), ("move", 6, 1)],
    ids=["before a record", "before a save", "deleted", "before the last save"],
)
def test_the_run_ends_in_one_line_and_resumes_where_it_was_moved(
    tmp_path: Path, warm: Warm, how: str, step: int, count: int
) -> None:
    _fails_because_it_was_moved(tmp_path, warm, how, step, count, tmp_path / "run")
    assert os.listdir(tmp_path / "run") == [] if how == "replace" else not (tmp_path / "run").exists()
    if how != "move":
        return
    allowed = "allow_targets=[own_logger.]"
    warm("resume=moved", allowed, cwd=tmp_path, within=importable_here)
    assert [record["train/step"] for record in records(tmp_path / "moved")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("step", [3, 4], ids=["before a record", "before a save"])
def test_no_checkpoint_is_saved_without_the_records(tmp_path: Path, warm: Warm, step: int) -> None:
    _fails_because_it_was_moved(tmp_path, warm, "records", step, 1, tmp_path / "run" / "metrics.jsonl")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def _fails_because_it_was_moved(
    folder: Path, warm: Warm, how: str, step: int, count: int, missing: Path
) -> None:
    (folder / "own_logger.py").write_text(LOGGER)
    saving = ("trainer.log_every=1", "trainer.save_every=2", "trainer.eval_every=6", "trainer.steps=6")
    mover = ("logger._target_=own_logger.Mover", f"+logger.args.how={how}", f"+logger.args.step={step}")
    sharding = ("sharding=ddp",) if count > 1 else ()
    arguments = (*TINY_GPT, *saving, *mover, *sharding, "run_dir=run")
    printed = warm(*arguments, cwd=folder, ranks=count, code=1, within=importable_here)
    (error,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: {missing} was moved, deleted or unmounted while")
    assert "Traceback" not in printed
