"""Races of the averages: what is eliminated, what is recorded, and what a report makes of it.

The error rates are those that `python -m tests.race` prints for many simulations.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from ema import EMABank, EMAConfig
from tests.makers import constant_network, refusal_of
from tests.race import planted, rates
from tests.ranks import RankPool
from trainer.config.schema import TrainerConfig
from trainer.data.batches import eval_batches, eval_indices
from trainer.distributed.sharding import Network
from trainer.evaluation.evaluation import EvalBatch, Evaluation
from trainer.evaluation.race import Race, parts_of, race_of
from trainer.report import write_report
from trainer.report.best_decay import optimum
from trainer.report.group import Group
from trainer.report.pairs import eliminated_at
from trainer.report.runs import Run, read_run
from trainer.report.text.race_table import race_table
from trainer.report.text.table import table_of
from trainer.report.verdicts import ELIMINATED, rows_of
from trainer.rundir.columns import Series
from trainer.rundir.pairs import Pairs, read_last_pairs
from trainer.seeding import StepRandom

SAMPLES = 64
RACE = Race("loss", False, 4)


class Noisy:
    """A task whose loss is (weight - 3)^2 and a little noise of the weight itself."""

    primary_metric = "loss"
    higher_is_better = ()

    def metrics(self, model: nn.Module, batch: dict, random: StepRandom) -> dict:
        weight = model(torch.ones_like(batch["x"])).squeeze(1)
        return {"loss": (weight - 3).square() + 0.1 * weight * random.normal(), "x": batch["x"].squeeze(1)}


class Counted:
    """Batches of at most 8 samples of a part for one of several ranks; counts the samples."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world, self.count = rank, world, 0

    def __call__(self, part: tuple[int, int] = (0, SAMPLES)) -> Iterator[EvalBatch]:
        whole = torch.arange(*part)
        own = whole[self.rank :: self.world]
        for positions in own.split(8):
            self.count += len(positions)
            noise = StepRandom(0, -1, total=SAMPLES, rows=positions)
            yield EvalBatch(
                {"x": positions.double()[:, None]}, torch.ones(len(positions)).bool(), positions, noise
            )


class Fixed:
    """An average with a weight that is set."""

    started = True

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def swapped_into(self, model: nn.Module):  # type: ignore[no-untyped-def]
        from ema.swap import weights_swapped_into

        return weights_swapped_into(model, {"weight": torch.full((1, 1), self.weight, dtype=torch.float64)})


AVERAGES = {"far": 9.0, "good": 3.01, "off": 5.0}


def raced(full: bool = False) -> tuple[dict[str, float], Pairs, int]:
    batches = Counted(dist.get_rank(), dist.get_world_size())
    evaluation = Evaluation(Noisy(), batches, SAMPLES, race=RACE)
    kept: list[Pairs] = []
    averages = {name: Fixed(weight) for name, weight in AVERAGES.items()}
    record = evaluation(constant_network(8.0, torch.float64), averages, step=7, full=full, keep=kept.append)
    return record, kept[0], batches.count


def test_a_race_evaluates_the_live_weights_and_the_best_average_on_all_samples(group: None) -> None:
    record, _, count = raced()
    full, all_pairs, all_count = raced(full=True)
    assert all_count == 4 * SAMPLES and count == 2 * SAMPLES + 2 * parts_of(SAMPLES)[0]
    assert not any("race" in key for key in full) and all_pairs.race == {}
    left = {key for key in full if "/far/" not in key and "/off/" not in key}
    assert {key: record[key] for key in left} == pytest.approx({key: full[key] for key in left}, rel=1e-12)
    counts = {f"eval/race/{name}/samples": 8.0 for name in AVERAGES} | {"eval/race/good/samples": SAMPLES}
    assert {key: value for key, value in record.items() if key not in left} == counts


def test_weights_are_compared_on_the_samples_that_both_have(group: None, tmp_path: Path) -> None:
    _, pairs, _ = raced()
    _, whole, _ = raced(full=True)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"train/step": 7, **pairs.to_json()}) + "\n")
    again = read_last_pairs(tmp_path / "pairs.jsonl")
    assert again is not None and again.metrics["loss"].weights == ("live", "good")
    assert (moments := again.common("loss", "good", "live")) is not None and moments.count == SAMPLES
    moments = again.common("loss", "far", "good")
    assert moments is not None and moments.count == 8
    assert moments.weights == ("live", "far", "good", "off")
    assert moments.means[1] != pytest.approx(whole.metrics["loss"].means[1], rel=1e-6)
    assert again.common("accuracy", "far", "good") is None


def test_ranks_decide_as_one_process_does(ranks: RankPool) -> None:
    ((alone, _, _),) = ranks(1, raced)
    for record, _, _ in ranks(3, raced):
        assert record == pytest.approx(alone, rel=1e-12)


def test_each_average_keeps_its_own_batchnorm_statistics_in_all_parts(group: None) -> None:
    class Normed(Noisy):
        def losses(self, model: nn.Module, batch: dict, random: StepRandom) -> torch.Tensor:
            return model(batch["x"] * 2).squeeze(1)

        def metrics(self, model: nn.Module, batch: dict, random: StepRandom) -> dict:
            return {"loss": model(batch["x"]).squeeze(1)}

    module = nn.BatchNorm1d(1, affine=True, dtype=torch.float64)
    net = Network(module, module, None, torch.device("cpu"))
    bank = EMABank(module, {name: EMAConfig(decay=float(name)) for name in ("0.5", "0.9")})
    for step in (1, 2):
        nn.init.constant_(module.weight, float(step))
        bank.update(module, iteration=step)
    evaluation = Evaluation(Normed(), Counted(), SAMPLES, Counted(), race=RACE)
    record, full = evaluation(net, bank, full=False), evaluation(net, bank)
    for key in full.keys() & record.keys():
        assert record[key] == pytest.approx(full[key], rel=1e-9), key
    assert record["eval/race/0.5/samples"] + record["eval/race/0.9/samples"] >= SAMPLES


def test_what_cannot_be_judged_stays_and_what_is_not_finite_goes() -> None:
    noise = np.random.default_rng(0).normal(size=16)
    live = noise + 5
    equal = {"live": live, "a": noise, "b": noise + 1e-9}
    assert RACE.survivors(equal, 64, 1) == ["a", "b"]
    constant = {"live": live, "a": np.zeros(16), "b": np.ones(16)}
    assert RACE.survivors(constant, 64, 1) == ["a", "b"]
    infinite = {"live": live, "a": noise, "b": np.where(noise > 1, np.inf, -1.0)}
    assert RACE.survivors(infinite, 64, 1) == ["a"]
    lost = {"live": live, "a": np.full(16, np.nan), "b": np.full(16, np.inf)}
    assert RACE.survivors(lost, 64, 1) == ["a", "b"]
    other = np.random.default_rng(1).normal(0, 0.1, 16)
    worse = {"live": live, "a": noise, "b": noise + 1 + other}
    assert RACE.survivors(worse, 64, 1) == ["a"]
    assert Race("accuracy", True, 4).survivors(worse, 64, 1) == ["b"]


def test_a_race_eliminates_the_best_average_in_less_than_a_twentieth_of_runs() -> None:
    """A run has four races, so each may err in at most a fourth of 5 %; power: most of the others are dropped."""
    for kind, most in (("all equal", 11), ("two equal", 4), ("one best", 7)):
        rate = rates(planted(kind), 256, 100, seed=3)
        assert rate.clearly_wrong <= 0.02 and rate.cost < most, kind
    assert rate.other_winner <= 0.02


def test_parts_double_and_cover_the_set_once() -> None:
    assert parts_of(256) == [8, 16, 32, 64, 128, 256]
    assert parts_of(5) == [5] and parts_of(8) == [8]
    assert parts_of(50_000)[0] == math.ceil(50_000 / 64) and parts_of(50_000)[-1] == 50_000

    class Data:
        def __len__(self) -> int:
            return 100

        def __getitems__(self, indices: list[int]) -> dict:
            return {"x": torch.tensor(indices)}

    positions, samples = [], []
    for part in ((0, 8), (8, 16), (16, 37)):
        for rank in range(3):
            for batch, valid, rows in eval_batches(Data(), 37, 4, rank, 3, 5, part=part):
                assert all(part[0] <= row < part[1] for row in rows.tolist())
                positions += rows[valid].tolist()
                samples += batch["x"][valid].tolist()
    assert sorted(positions) == list(range(37))
    assert [samples[positions.index(place)] for place in range(37)] == eval_indices(100, 37, 5).tolist()


def test_a_race_by_a_metric_of_the_whole_set_is_refused() -> None:
    task = Noisy()
    race = race_of(TrainerConfig(steps=500, eval_every=100, eval_policy="race"), task, {})
    assert race == Race("loss", False, 4)
    assert "trainer.eval_policy: expected full" in refusal_of(race.refuse_without, {"accuracy": 0})
    assert race_of(TrainerConfig(steps=100, eval_every=100, eval_policy="race"), task, {}) is None
    assert race_of(TrainerConfig(steps=500, eval_every=100), task, {}) is None


def stopped_run(folder: Path) -> Run:
    """A run whose last evaluation is a race, from which only 0.97 is left."""
    names = ("0.9", "0.97", "0.99", "0.999")
    random = np.random.default_rng(0)
    shared = random.normal(2, 0.3, 64)
    values = {
        name: shared + random.normal(0, 0.01, 64) + k / 10
        for name, k in zip(names, (2, 0, 3, 9), strict=True)
    }
    values = {"live": shared + 1} | values
    lines = [{"train/step": 10}, {"train/step": 20}]
    for name in values:
        key = "eval/live/loss" if name == "live" else f"eval/ema/{name}/loss"
        lines[0][key] = 9.0
        if name in ("live", "0.97"):
            lines[1][key] = float(values[name].mean())
        if name != "live":
            lines[1][f"eval/race/{name}/samples"] = 64 if name == "0.97" else 8
            lines[1][f"ema/{name}/decay"] = float(name)
    gap = values["live"] - values["0.97"]
    lines[1] |= {"eval/gap/0.97/loss": gap.mean(), "eval/gap/0.97/loss_se": gap.std(ddof=1) / 8}
    pairs = Pairs.of(
        20,
        {"loss": {name: values[name] for name in ("live", "0.97")}},
        {"loss": [{name: own[:8] for name, own in values.items()}]},
    )
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "pairs.jsonl").write_text(json.dumps({"train/step": 20, **pairs.to_json()}) + "\n")
    (folder / "meta.json").write_text(json.dumps({"higher_is_better": [], "num_samples": 64}))
    return read_run(folder)


def test_a_report_shows_an_eliminated_average_as_such_with_its_difference(tmp_path: Path) -> None:
    run = stopped_run(tmp_path / "run")
    rows = rows_of(run, "loss")
    verdicts = {row.weights: row.last.verdict for row in rows}
    assert verdicts == {
        "live": "",
        "0.97": "better",
        "0.9": ELIMINATED,
        "0.99": ELIMINATED,
        "0.999": ELIMINATED,
    }
    assert [row.weights for row in rows if row.may_be_best] == ["0.97"]
    assert [row.weights for row in rows if row.last.winner] == ["0.97"]
    assert optimum(Group("run", [run]), rows) is None
    (note,) = [note for note in table_of(run, "loss").notes if note.startswith("Eliminated")]
    assert note.startswith("Eliminated at step 20: EMA 0.9 (8 samples, +0.2")


def test_an_average_without_a_finite_value_is_not_the_one_to_which_eliminated_ones_are_compared(
    tmp_path: Path,
) -> None:
    run = stopped_run(tmp_path / "run")
    diverged = {"eval/ema/0.9/loss": Series(np.array([10, 20]), np.array([9.0, math.nan]))}
    run = replace(run, columns=run.columns | diverged)
    found = {own.weights: own.gap for own in eliminated_at(Group("run", [run]), "loss", 20)}
    assert found["0.99"] is not None and found["0.99"].mean == pytest.approx(0.3, abs=0.02)
    assert found.keys() == {"0.99", "0.999"}


def raced_run(folder: Path) -> Run:
    """A run with three races, each with another survivor, and all averages at the last step."""
    names, lines = ("0.9", "0.97", "0.99"), []
    for number, step in enumerate((10, 20, 30, 40)):
        line: dict[str, float] = {"train/step": step, "eval/live/loss": 2.0}
        for k, name in enumerate(names):
            line[f"ema/{name}/decay"] = float(name)
            if step < 40:
                line[f"eval/race/{name}/samples"] = 64 if k == number else 8 * (k + 1)
            if step == 40 or k == number:
                line |= {f"eval/ema/{name}/loss": 1.0 + k, f"eval/gap/{name}/loss": 1.0 - k}
        lines.append(line)
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "meta.json").write_text(json.dumps({"higher_is_better": [], "num_samples": 64}))
    return read_run(folder)


def test_table_and_page_name_who_was_out_when_and_after_how_many_samples(tmp_path: Path) -> None:
    run = raced_run(tmp_path / "run")
    (note,) = [note for note in table_of(run, "loss").notes if note.startswith("Raced")]
    assert note.startswith(
        "Raced at step 30, EMA eliminated after samples: 0.9 after 8; 0.97 after 16; 3 such races are in the report."
    )
    races = race_table(run, "loss")
    assert races is not None and races.headers == ["step", "EMA 0.9", "EMA 0.97", "EMA 0.99"]
    assert [line.cells for line in races.lines] == [
        ["10", "all 64", "out after 16", "out after 24"],
        ["20", "out after 8", "all 64", "out after 24"],
        ["30", "out after 8", "out after 16", "all 64"],
    ]
    paths = write_report(run.path)
    assert paths.heat_map is None, "a map of mostly empty cells"
    page = paths.page.read_text()
    assert (
        "out after 24" in page and "An average that a race eliminated at a step has no value there." in page
    )
    assert "out after 24" in paths.markdown.read_text()


def test_a_mean_over_seeds_has_no_step_at_which_one_of_them_lost_a_race(tmp_path: Path) -> None:
    runs = []
    for seed, lost in enumerate((True, False)):
        folder = tmp_path / f"seed_{seed}"
        folder.mkdir()
        lines = [
            {"train/step": step, "eval/live/loss": 2.0, "eval/ema/0.9/loss": 1.0} for step in (10, 20, 30)
        ]
        lines = [line | {"eval/gap/0.9/loss": 1.0} for line in lines]
        lines[1]["eval/race/0.9/samples"] = 64
        if lost:
            lines[1] = {"train/step": 20, "eval/live/loss": 2.0, "eval/race/0.9/samples": 8}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "config.yaml").write_text(f"seed: {seed}\n")
        runs.append(read_run(folder))
    evaluations = Group("both", runs).evaluations("loss")
    for table in (evaluations.values, evaluations.gaps):
        assert np.isnan(table["0.9"]).tolist() == [[False, True, False]] * 2
    assert not np.isnan(evaluations.values["live"]).any()
    (row,) = [row for row in rows_of(Group("both", runs), "loss") if row.weights == "0.9"]
    assert (row.seeds, row.last_step) == (2, 30)
