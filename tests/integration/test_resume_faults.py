"""A checkpoint that one rank alone cannot read ends the run on all ranks, in one line and within a bounded time.

The fault is put into the last of two ranks, at each of the places where a checkpoint is read.
"""

import errno
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.integration.commands import TINY_GPT, Warm, _train, free_port
from tests.ranks import RankPool

FAULT = OSError(errno.EIO, "Input/output error")
PLACES = {
    "state.json": ".read_text",
    "COMMIT.json": ".read_text",
    ".metadata": "_IndexUnpickler.load",
    "a checksum": "digests",
    "a tensor": "Reader.read_data",
}


def _resume(rank: int, run_dir: str, cwd: str, port: int, file: str) -> tuple[int, str]:
    """`resume=` in one of two ranks; reading fails in the last."""
    read_text = Path.read_text

    def failing(path: Path, **options: Any) -> str:
        if path.name == file:
            raise FAULT
        return read_text(path, **options)

    with ExitStack() as stack:
        if rank == 1 and PLACES[file] == ".read_text":
            stack.enter_context(patch("pathlib.Path.read_text", failing))
        elif rank == 1:
            stack.enter_context(patch(f"trainer.checkpoint_format.{PLACES[file]}", side_effect=FAULT))
        overrides = (f"resume={run_dir}", "sharding=ddp", "trainer.steps=4", "trainer.timeout_s=20")
        return _train(rank, 2, overrides, cwd, port, False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    folder = tmp_path_factory.mktemp("made")
    warm(*TINY_GPT, "trainer.steps=2", "run_dir=run", cwd=folder)
    return folder / "run"


@pytest.mark.parametrize("file", PLACES)
def test_a_checkpoint_that_one_rank_cannot_read_ends_all_ranks_in_one_line(
    made: Path, ranks: RankPool, tmp_path: Path, file: str
) -> None:
    replies = ranks.apart(2, _resume, str(made), str(tmp_path), free_port(), file)
    assert [code for code, _ in replies] == [2, 2], replies
    (line,) = "".join(printed for _, printed in replies).splitlines()
    assert "resume: " in line and "cannot be read" in line and "Input/output error" in line
    assert "damaged" not in line and "remove" not in line
