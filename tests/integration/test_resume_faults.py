"""A checkpoint that one rank alone cannot read ends the run on all ranks, in one line and within a bounded time.

The fault is put into the last of two ranks, at each of the places where a checkpoint is read.
"""

import errno
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.integration.commands import Warm
from tests.makers import TINY_GPT

FAULT = OSError(errno.EIO, "Input/output error")
PLACES = {
    "state.json": ".read_text",
    "COMMIT.json": ".read_text",
    ".metadata": "_IndexUnpickler.load",
    "a checksum": "digest",
    "a tensor": "Reader.read_data",
}


def fault(rank: int, file: str) -> AbstractContextManager[object]:
    """Reading fails in the last of two ranks."""
    if rank == 0:
        return nullcontext()
    if PLACES[file] != ".read_text":
        return patch(f"trainer.checkpoint.format.{PLACES[file]}", side_effect=FAULT)
    read_text = Path.read_text

    def failing(path: Path, **options: Any) -> str:
        if path.name == file:
            raise FAULT
        return read_text(path, **options)

    return patch("pathlib.Path.read_text", failing)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    folder = tmp_path_factory.mktemp("made")
    warm(*TINY_GPT, "trainer.steps=2", "run_dir=run", cwd=folder)
    return folder / "run"


@pytest.mark.parametrize("file", PLACES)
def test_a_checkpoint_that_one_rank_cannot_read_ends_all_ranks_in_one_line(
    made: Path, warm: Warm, tmp_path: Path, file: str
) -> None:
    resume = (f"resume={made}", "sharding=ddp", "trainer.steps=4", "trainer.timeout_s=20")
    printed = warm(*resume, cwd=tmp_path, ranks=2, code=2, within=partial(fault, file=file))
    (line,) = printed.splitlines()
    assert "resume: " in line and "cannot be read" in line and "Input/output error" in line
    assert "damaged" not in line and "remove" not in line
