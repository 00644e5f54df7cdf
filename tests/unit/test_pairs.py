"""What `pairs.jsonl` keeps: every paired difference and its error, as of the samples themselves."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from ema import EMABank, EMAConfig
from tests.makers import refusal_of, start_loggers
from tests.ranks import RankPool
from trainer.distributed.sharding import Network
from trainer.evaluation.evaluation import EvalBatch, Evaluation
from trainer.rundir.pairs import Moments, Pairs, read_last_pairs
from trainer.seeding import StepRandom

SAMPLES = 37


class Squared:
    """A task with two metrics of a model of one weight; its noise is that of the sample."""

    primary_metric = "loss"

    def metrics(self, model: nn.Module, batch: dict, random: StepRandom) -> dict:
        error = model(batch["x"]).squeeze(1) - random.normal()
        return {"loss": error.square(), "accuracy": (error.abs() < 1).float()}


def parts_of_the_set(rank: int, world: int) -> Iterator[EvalBatch]:
    """Batches of 4 samples of this rank, the last one padded."""
    own = torch.arange(rank, SAMPLES, world)
    for first in range(0, math.ceil(SAMPLES / world), 4):
        positions = own[first : first + 4]
        valid = torch.arange(4) < len(positions)
        positions = nn.functional.pad(positions, (0, 4 - len(positions)), value=int(own[-1]))
        noise = StepRandom(0, -1, total=SAMPLES, rows=positions)
        yield EvalBatch({"x": positions.double()[:, None] / SAMPLES}, valid, positions, noise)


def evaluated(_: object = None) -> tuple[dict[str, float], Pairs]:
    """An evaluation of three averages, one of which has not started."""
    module = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    network = Network(module, module, None, torch.device("cpu"))
    settings = {name: EMAConfig(decay=float(name)) for name in ("0.5", "0.9")}
    bank = EMABank(module, settings | {"late": EMAConfig(start_iter=10)})
    for step in range(1, 4):
        nn.init.constant_(module.weight, float(step))
        bank.update(module, iteration=step)
    kept: list[Pairs] = []
    rank, world = dist.get_rank(), dist.get_world_size()
    evaluation = Evaluation(Squared(), lambda: parts_of_the_set(rank, world), SAMPLES)
    record = evaluation(network, bank, step=3, keep=kept.append)
    return record, kept[0]


def test_an_evaluation_keeps_the_pairs_of_all_weights_and_its_gaps_follow_from_them(group: None) -> None:
    record, pairs = evaluated()
    assert pairs.step == 3 and list(pairs.metrics) == ["loss", "accuracy"]
    for metric, moments in pairs.metrics.items():
        assert (moments.weights, moments.count) == (("live", "0.5", "0.9"), SAMPLES)
        for name in ("0.5", "0.9"):
            gap, error = moments.contrast({"live": 1.0, name: -1.0})
            assert gap == pytest.approx(record[f"eval/gap/{name}/{metric}"], rel=1e-12, abs=1e-15)
            assert error == pytest.approx(record[f"eval/gap/{name}/{metric}_se"], rel=1e-12)


def test_pairs_do_not_depend_on_the_number_of_ranks(ranks: RankPool) -> None:
    ((_, alone),) = ranks(1, evaluated, None)
    for _, several in ranks(3, evaluated, None):
        for metric, moments in alone.metrics.items():
            np.testing.assert_allclose(several.metrics[metric].means, moments.means, rtol=1e-12)
            np.testing.assert_allclose(several.metrics[metric].products, moments.products, rtol=1e-12)


def test_every_pair_has_the_difference_and_error_of_its_samples_and_diverged_weights_have_none() -> None:
    random = np.random.default_rng(0)
    shared = random.normal(1000, 100, 64)
    # Two averages that differ by a billionth of what all weights share.
    values = {name: shared + random.normal(0, 1e-7, 64) for name in ("live", "a", "b")}
    moments = Moments.of(values | {"diverged": np.full(64, np.inf)})
    assert moments is not None and moments.weights == ("live", "a", "b")
    for one, other in (("live", "a"), ("a", "b"), ("b", "live")):
        difference = values[one] - values[other]
        mean, error = moments.contrast({one: 1.0, other: -1.0})
        assert mean == pytest.approx(difference.mean(), abs=1e-12)
        assert error == pytest.approx(difference.std(ddof=1) / 8, rel=1e-6)
    mean, error = moments.contrast({"a": 1.0})
    assert error == pytest.approx(values["a"].std(ddof=1) / 8, rel=1e-9)
    assert Moments.of({"live": np.array([math.nan])}) is None
    huge = Moments.of({"live": np.array([1e200, 2e200, 1.0]), "a": np.array([1e149, -1e149, 0.0])})
    assert huge is not None and huge.weights == ("a",) and np.isfinite(huge.products).all()
    single = Moments.of({"live": np.ones(1), "a": np.zeros(1)})
    assert single is not None and math.isnan(single.contrast({"live": 1.0, "a": -1.0})[1])
    equal = Moments.of({"live": shared, "a": shared.copy()})
    assert equal is not None and equal.contrast({"live": 1.0, "a": -1.0}) == (0.0, 0.0)


def pairs_at(step: int) -> Pairs:
    return Pairs.of(step, {"loss": {"live": np.array([1.0, 2.0, step]), "0.9": np.array([1.0, 1.5, 1.0])}})


def test_pairs_are_written_read_back_and_cut_to_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    assert read_last_pairs(path) is None
    loggers = start_loggers(tmp_path, "none")
    for step in (10, 20, 30):
        loggers.keep_pairs(pairs_at(step))
    loggers.sync()
    loggers.close({}, 0)
    found = read_last_pairs(path)
    assert found is not None and found.step == 30
    np.testing.assert_array_equal(found.metrics["loss"].means, pairs_at(30).metrics["loss"].means)
    np.testing.assert_array_equal(found.metrics["loss"].products, pairs_at(30).metrics["loss"].products)
    with path.open("ab") as file:
        file.write(b'{"train/step": 40, "sam')  # torn
    assert read_last_pairs(path) is not None
    again = start_loggers(tmp_path, "none", resumed_at=20)
    again.keep_pairs(pairs_at(25))
    again.close({}, 0)
    assert [json.loads(line)["train/step"] for line in path.read_text().splitlines()] == [10, 20, 25]


def test_damaged_pairs_refuse_the_resume_and_leave_the_records_as_they_are(tmp_path: Path) -> None:
    loggers = start_loggers(tmp_path, "none")
    for step in (10, 20, 30):
        loggers.keep_pairs(pairs_at(step))
        loggers.log(step, {"train/loss": 1.0})
    loggers.close({}, 0)
    path, records = tmp_path / "pairs.jsonl", (tmp_path / "metrics.jsonl").read_bytes()
    path.write_bytes(b"no pairs\n" + path.read_bytes())
    refusal = refusal_of(start_loggers, tmp_path, "none", resumed_at=20)
    assert "pairs.jsonl, line 1: expected a JSON object" in refusal
    assert (tmp_path / "metrics.jsonl").read_bytes() == records


def test_pairs_that_cannot_be_written_stop_the_run_as_records_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loggers = start_loggers(tmp_path, "none")
    monkeypatch.setattr("os.write", lambda descriptor, data: (_ for _ in ()).throw(OSError(28, "full")))
    loggers.keep_pairs(pairs_at(1))
    assert loggers.failed


@pytest.mark.parametrize(
    "line",
    [
        b"[1]",
        b'{"train/step": 1, "samples": 3}',
        b'{"train/step": 1, "pairs": {"loss": [1]}}',
        b'{"train/step": 1, "pairs": {"loss": {"samples": 3, "weights": ["a"], "means": [1], "products": [[1, 2]]}}}',
        b'{"train/step": 1, "pairs": {"loss": {"samples": 3, "weights": ["a"], "means": [null], "products": [[1]]}}}',
        b'{"train/step": 1, "pairs": {"loss": {"samples": 3, "weights": ["a"], "means": [1], "products": [[-1]]}}}',
        b'{"train/step": 1, "pairs": {"loss": {"samples": 3, "weights": ["a"], "means": [1e300], "products": [[1]]}}}',
        b'{"train/step": 1, "pairs": {"loss": {"samples": 3, "weights": ["a", "a"], "means": [1, 1],'
        b' "products": [[1], [1, 1]]}}}',
        b"[" * 5000,
        # Weights of one name would be added up, and such a count is no float.
        b'{"train/step": 1, "pairs": {"loss": {"samples": 2, "weights": ["a", "a"], "means": [1, 2],'
        b' "products": [[1], [0, 1]]}}}',
        b'{"train/step": 1, "pairs": {"loss": {"samples": 1%s, "weights": ["a"], "means": [1],'
        b' "products": [[1]]}}}' % (b"0" * 400),
    ],
)
def test_a_line_that_has_no_pairs_is_refused_and_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(line + b"\n")
    assert "pairs.jsonl, last line: expected" in refusal_of(read_last_pairs, tmp_path / "pairs.jsonl")


def test_the_last_line_is_found_however_long_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.rundir.records.FIRST_READ_BYTES", 16)
    loggers = start_loggers(tmp_path, "none")
    for step in (10, 20):
        loggers.keep_pairs(pairs_at(step))
    loggers.close({}, 0)
    found = read_last_pairs(tmp_path / "pairs.jsonl")
    assert found is not None and found.step == 20
