"""`ema=axis`: the best decay between the tracked ones, in a real run, on any number of ranks and after a resume."""

from pathlib import Path

import pytest

from tests.integration.commands import Warm, records
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
