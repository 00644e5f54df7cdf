"""A disk that fills while a run trains or reports: one line, nothing lost, and `resume=` ends as if it had not."""

import errno
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.integration.commands import Warm, assert_equal_runs, records
from tests.makers import TINY_GPT
from trainer.checkpoint.store import newest_checkpoint
from trainer.loggers import JsonlLogger

RUN = (*TINY_GPT, "ema.decays=[0.9,0.99]", "trainer.steps=8", "trainer.log_every=1", "trainer.save_every=2")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    warm(*RUN, "sharding=ddp", "run_dir=run", cwd=folder, ranks=2)
    return folder / "run"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 20 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("only root mounts a disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def filling(disk: Path, step: int, rank: int) -> AbstractContextManager[object]:
    """Context in which the disk fills before the record of that step is written."""
    log = JsonlLogger.log

    def fill(self: JsonlLogger, at: int, metrics: dict[str, float]) -> None:
        if at == step:
            with open(disk / "fill", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(4096))
        log(self, at, metrics)

    return patch.object(JsonlLogger, "log", fill)


@pytest.mark.parametrize("step", [5, 8], ids=["while-training", "at-the-end"])
def test_records_without_room_end_all_ranks_in_one_line_and_the_run_goes_on_later(
    undisturbed: Path, disk: Path, warm: Warm, step: int
) -> None:
    arguments = (*RUN, "sharding=ddp", "run_dir=run")
    printed = warm(*arguments, cwd=disk, ranks=2, code=1, within=partial(filling, disk, step))
    (error,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert re.match(
        rf"error: {disk}/run/(metrics\.jsonl|pairs\.jsonl|checkpoints): .*No space left on device", error
    )
    assert "Traceback" not in printed
    assert newest_checkpoint(disk / "run" / "checkpoints") is not None
    (disk / "fill").unlink()
    warm("resume=run", cwd=disk, ranks=2)
    assert_equal_runs(undisturbed, disk / "run")


@contextmanager
def without_room_for_a_moment(rank: int) -> Iterator[None]:
    """The first write of a fifth record fails."""
    write, faults = os.write, [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]

    def fail_once(descriptor: int, data: bytes) -> int:
        if faults and data.startswith(b'{"train/step": 5,'):
            raise faults.pop()
        return write(descriptor, data)

    with patch("trainer.loggers.jsonl.os.write", fail_once):
        yield


def test_a_moment_without_room_ends_the_run_saved_with_all_records(
    undisturbed: Path, tmp_path: Path, warm: Warm
) -> None:
    arguments = (*RUN, "sharding=ddp", "run_dir=run")
    printed = warm(*arguments, cwd=tmp_path, ranks=2, code=1, within=without_room_for_a_moment)
    run = tmp_path / "run"
    (error,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert error.startswith(
        f"error: {run / 'metrics.jsonl'}: could not be written: No space left on device; now"
    )
    saved = newest_checkpoint(run / "checkpoints")
    assert saved is not None and saved.name.endswith("6")  # all ranks agree one step later
    assert [record["train/step"] for record in records(run)] == [1, 2, 3, 4, 5, 6]
    warm("resume=run", cwd=tmp_path, ranks=2)
    assert_equal_runs(undisturbed, run)


@contextmanager
def without_room(rank: int) -> Iterator[None]:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with patch("trainer.run.write_result", side_effect=error):
        yield


def test_a_report_without_room_is_one_line_and_resume_writes_it(tmp_path: Path, warm: Warm) -> None:
    arguments = (*RUN, "sharding=ddp", "run_dir=run")
    printed = warm(*arguments, cwd=tmp_path, ranks=2, report=True, code=1, within=without_room)
    run = tmp_path / "run"
    (error,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert error.startswith(
        f"error: {run / 'report'}: cannot be written: No space left on device; all steps are"
    )
    assert "Traceback" not in printed
    saved, kept = newest_checkpoint(run / "checkpoints"), records(run)
    assert saved is not None and saved.name.endswith("8")
    warm("resume=run", "sharding=none", cwd=tmp_path, report=True)
    assert (run / "report" / "index.html").is_file()
    assert (newest_checkpoint(run / "checkpoints"), records(run)) == (saved, kept)
