"""`python -m tests.gpu` where no card is: it names that nothing ran, and its parts can be imported."""

import importlib
import time
from pathlib import Path

import pytest
import torch

from tests.gpu import __main__ as gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is here")
def test_without_a_card_nothing_runs_and_the_message_names_that(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 0
    assert capsys.readouterr().out.strip() == gpu.NO_CARD


@pytest.mark.parametrize("part", gpu.PARTS, ids=lambda part: part.name)
def test_every_part_can_be_imported(part: gpu.Part) -> None:
    assert callable(importlib.import_module(part.command("cpu")[2]).main)


def test_a_part_that_fails_is_one_line_with_its_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for limit_s, error in ((20, "No module named tests.gpu.no_such_part"), (0, "stopped after")):
        assert gpu.run_part(gpu.Part("no_such_part", 20), "cpu", "CPU", time.monotonic() + limit_s, tmp_path)
        assert error in capsys.readouterr().out


def test_the_parts_fit_into_eight_minutes() -> None:
    assert sum(part.limit_s for part in gpu.PARTS) <= 465
