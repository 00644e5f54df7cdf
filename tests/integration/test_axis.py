"""`ema=axis`: the best decay between the tracked ones, in a real run, on any number of ranks and after a resume."""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from launch.posthoc import main as posthoc
from tests.integration.commands import Warm, deterministic, records, saved
from tests.makers import TINY_GPT

# Few and large steps: an average wins early, and no rounding has grown to 1e-5 yet.
SGD = ("optimizer=sgd", "optimizer.lr=0.5", "schedule.warmup_steps=0", "trainer.max_grad_norm=0")
RUN = (*TINY_GPT, *SGD, "ema=axis", "trainer.steps=6", "trainer.eval_every=3")
QUANTITIES = ("horizon", "decay", "loss", "predicted_error")


def axis_of(run: Path) -> dict[int, list[float]]:
    """The best decay of each evaluation: its horizon, decay, loss and predicted error."""
    return {
        int(record["train/step"]): [record[f"axis/{quantity}"] for quantity in QUANTITIES]
        for record in records(run)
        if "axis/horizon" in record
    }


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("one")
    warm(*RUN, "run_dir=run", cwd=folder)
    return folder / "run"


def test_the_best_decay_agrees_with_one_that_is_tracked(
    one_process: Path, tmp_path: Path, warm: Warm
) -> None:
    found = axis_of(one_process)
    assert list(found) == [3, 6]
    horizon, decay, loss, error = found[6]
    assert 4 < horizon < 8 and decay == 1 - 1 / horizon and 0 < error < 1e-3
    warm(*RUN, f"ema.decay={decay!r}", "run_dir=run", cwd=tmp_path)
    tracked = records(tmp_path / "run")[-1]
    own = records(one_process)[-1]
    assert loss == pytest.approx(tracked[f"eval/ema/{decay!r}/loss"], abs=1e-4)
    assert own["eval/live/loss"] == tracked["eval/live/loss"]
    # The tracked horizons differ from it by far more than that, so an average that is not made is seen.
    nearest = min(abs(loss - own[f"eval/ema/horizon_{one}/loss"]) for one in (2, 4, 8))
    assert nearest > 1e-3
    assert not any(key.startswith("eval/ema/initial") for key in own)


@pytest.mark.parametrize("sharding", ["fsdp", "ddp"])
def test_two_ranks_make_the_same(one_process: Path, tmp_path: Path, warm: Warm, sharding: str) -> None:
    warm(*RUN, f"sharding={sharding}", "run_dir=run", cwd=tmp_path, ranks=2)
    found, expected = axis_of(tmp_path / "run"), axis_of(one_process)
    assert list(found) == list(expected)
    assert [one[2] for one in found.values()] == pytest.approx(
        [one[2] for one in expected.values()], abs=1e-5
    )
    assert [one[0] for one in found.values()] == pytest.approx(
        [one[0] for one in expected.values()], rel=1e-4
    )


def test_a_resumed_run_goes_on_and_the_report_shows_it(one_process: Path, tmp_path: Path, warm: Warm) -> None:
    warm(*RUN, "trainer.steps=3", "run_dir=run", cwd=tmp_path)
    warm("resume=run", "trainer.steps=6", cwd=tmp_path, report=True)
    assert axis_of(tmp_path / "run") == axis_of(one_process)
    report = tmp_path / "run" / "report"
    assert (report / "best_decay.png").is_file()
    assert "The horizon of the best decay at each evaluation" in (report / "index.html").read_text()


LOUD = ("optimizer=adamw", "optimizer.lr=0.03", "schedule.warmup_steps=0")
GROWING = (
    *TINY_GPT,
    *LOUD,
    "ema=axis",
    "ema.axis=3",
    "ema.axis_grows=true",
    "trainer.steps=96",
    "trainer.eval_every=8",
    "trainer.save_every=64",
)


@contextmanager
def eager(rank: int) -> Iterator[None]:
    """Let the bank grow as soon as its longest average is the best one; so small a run shows no clear difference."""
    with patch("trainer.evaluation.axis.CLEAR", -math.inf):
        yield


@pytest.mark.parametrize(("world", "sharding"), [(1, "none"), (2, "fsdp")])
def test_a_bank_that_has_grown_goes_on_after_a_resume_and_is_read_by_posthoc(
    tmp_path: Path, warm: Warm, world: int, sharding: str
) -> None:
    run = (*GROWING, f"sharding={sharding}")
    printed = warm(*run, "run_dir=whole", cwd=tmp_path, ranks=world, within=eager)
    assert "horizon_16 begins now" in printed
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000096")
    resumed = warm("resume=parts", cwd=tmp_path, ranks=world, within=eager)
    assert "is not" not in resumed, resumed  # no average is missing or left behind
    (tensors, values), (expected, expected_values) = saved(tmp_path / "parts"), saved(tmp_path / "whole")
    assert values == expected_values and tensors.keys() == expected.keys()
    assert any(key.startswith("ema/horizon_16/") for key in tensors)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors.items())
    found, wanted = ([*map(deterministic, records(tmp_path / name))] for name in ("parts", "whole"))
    assert found == wanted
    assert "eval/ema/horizon_16/loss" in found[-1] and "axis/horizon" in found[-1]
    table = warm("parts", "decay=0.93", "basis=ema/*", cwd=tmp_path, ranks=world, main=posthoc)
    assert "10 stored weights of 2 steps" in table and "EMA horizon_16" in table and "left out" not in table
