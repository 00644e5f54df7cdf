"""`python -m tests.gpu` where no card is: it names that nothing ran, and its parts can be imported."""

import importlib

import pytest
import torch

from tests.gpu import __main__ as gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is here")
def test_without_a_card_nothing_runs_and_the_message_names_that(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 0
    assert capsys.readouterr().out.strip() == gpu.NO_CARD


@pytest.mark.parametrize("part", gpu.PARTS, ids=lambda part: part.name)
def test_every_part_can_be_imported(part: gpu.Part) -> None:
    assert callable(importlib.import_module(f"tests.gpu.{part.name}").main)


def test_a_part_that_fails_is_one_line_with_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.run_part(gpu.Part("no_such_part", 20), "cpu", "CPU", end=float("inf"))
    assert "No module named tests.gpu.no_such_part" in capsys.readouterr().out
