"""`ema=axis`: the bank that the steps settle, and the decays that are made from it during the run.

A made average is compared with a tracked one in float64. The weights of a constant decay are in closed form:
w_s = (1 - b) b^(T-s), w_0 = b^T.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor, nn

from ema import EMABank, EMAConfig
from ema.rules import profile
from tests.makers import refusal_of
from trainer.config.averages import axis_horizons, settle_averages, without_initial
from trainer.config.schema import Config, EMAGroupConfig, TrainerConfig
from trainer.distributed.sharding import Network
from trainer.evaluation.axis import EvaluationOfAxis, made, points_of
from trainer.evaluation.evaluation import Evaluation


def config(steps: int = 240, policy: str = "full", **ema: Any) -> Config:
    ema = {"type": "constant", "axis": 10} | ema
    return Config(ema=EMAGroupConfig(**ema), trainer=TrainerConfig(steps=steps, eval_policy=policy))


@pytest.mark.parametrize(
    ("steps", "count", "horizons"),
    [
        (1, 10, [2, 4, 8]),
        (240, 10, [2, 4, 8, 16, 32, 64]),
        (2000, 10, [2, 4, 8, 16, 32, 64, 128, 256, 512]),
        (2000, 3, [128, 256, 512]),
        (1_000_000, 10, [2**power for power in range(9, 19)]),
    ],
)
def test_the_steps_settle_the_horizons(steps: int, count: int, horizons: list[int]) -> None:
    assert axis_horizons(steps, count) == horizons
    settled = settle_averages(config(steps, axis=count))
    names = [f"horizon_{horizon}" for horizon in horizons]
    assert [*settled] == [*names, "initial"]
    assert [one.decay for one in settled.values()] == [*(1 - 1 / horizon for horizon in horizons), 1.0]
    assert [*without_initial(config(steps), settled)] == names


@pytest.mark.parametrize(
    ("choices", "key"),
    [
        ({"decays": [0.9]}, "ema.decays: "),
        ({"averages": {"a": {}}}, "ema.averages: "),
        ({"type": "power"}, "ema.type: "),
        ({"reference_batch_size": 8}, "ema.reference_batch_size: "),
        ({"rule": "mine.slow"}, "ema.rule: "),
        ({"policy": "race"}, "trainer.eval_policy: "),
    ],
)
def test_what_does_not_fit_the_axis_is_refused(choices: dict[str, Any], key: str) -> None:
    assert refusal_of(settle_averages, config(**choices)).startswith(key)


TRACKED = 11.3
"""Horizon between those of the bank, which is tracked too."""


def walked(
    steps: int, path: Callable[[Tensor], Tensor], skipped: tuple[int, ...] = ()
) -> tuple[nn.Module, EMABank]:
    """A model whose weights moved at random, with averages over the way of horizons 2 to 32, and a tracked one."""
    torch.manual_seed(0)
    model = nn.Linear(40, 40, bias=False).double()
    configs = {f"horizon_{h}": EMAConfig(decay=1 - 1 / h, dtype="float64") for h in (2, 4, 8, 16, 32)}
    configs["initial"] = EMAConfig(decay=1.0, dtype="float64")
    configs["tracked"] = EMAConfig(decay=1 - 1 / TRACKED, dtype="float64")
    bank = EMABank(model, configs)
    bank.update(model, iteration=0)
    for step in range(1, steps + 1):
        if step not in skipped:
            with torch.no_grad():
                model.weight.copy_(path(model.weight))
        bank.update(model, iteration=step, finite=step not in skipped)
    return model, bank


def diffusing(weight: Tensor) -> Tensor:
    return weight + torch.randn_like(weight)


class Bank(dict[str, Any]):
    """The averages of a bank without the tracked one."""

    def __init__(self, bank: EMABank) -> None:
        super().__init__({name: average for name, average in bank.items() if name != "tracked"})
        self.combined = bank.combined


@pytest.mark.parametrize(("steps", "skipped"), [(150, ()), (16, (2, 5, 9, 10, 11, 15))])
def test_a_made_average_agrees_with_a_tracked_one_as_predicted(steps: int, skipped: tuple[int, ...]) -> None:
    model, bank = walked(steps, diffusing, skipped)
    choice = made(cast(EMABank, Bank(bank)), TRACKED)
    found = bank.combined(model, choice.coefficients, choice.live)["weight"]
    tracked = bank["tracked"].state_dict()["weight"]
    error = float((found - tracked).norm() / (tracked - cast(Tensor, model.weight).detach()).norm())
    assert found.dtype == torch.float64
    assert choice.error < 0.01 and 0.5 < error / choice.error < 2


def test_skipped_steps_do_not_count() -> None:
    found, expected = (
        made(cast(EMABank, Bank(walked(steps, diffusing, skipped)[1])), TRACKED)
        for steps, skipped in ((16, (2, 5, 9, 10, 11, 15)), (10, ()))
    )
    assert found.error == pytest.approx(expected.error)
    assert found.coefficients == pytest.approx(expected.coefficients)


def test_the_sum_of_averages_is_that_of_their_profiles() -> None:
    steps = 20
    model = nn.Linear(steps + 1, 1, bias=False).double()
    bank = EMABank(model, {name: EMAConfig(decay=b, dtype="float64") for name, b in (("a", 0.5), ("b", 0.9))})
    for step in range(steps + 1):  # the shadows of one-hot weights are the profiles
        with torch.no_grad():
            model.weight.copy_(torch.eye(steps + 1)[step])
        bank.update(model, iteration=step)
    found = bank.combined(model, {"a": 2.0, "b": -1.5}, live=0.5)["weight"][0]
    a, b = (torch.tensor(profile(EMAConfig(decay=b), steps), dtype=torch.float64) for b in (0.5, 0.9))
    torch.testing.assert_close(
        found, 2 * a - 1.5 * b + 0.5 * torch.eye(steps + 1)[-1].double(), rtol=0, atol=1e-14
    )


class Bowl:
    """An evaluation whose loss is the squared distance of the weights from a point, with noise of each sample."""

    task = SimpleNamespace(primary_metric="loss", higher_is_better=(), metric_units={})
    metrics: ClassVar[dict[str, Any]] = {}
    sets: ClassVar[dict[str, Any]] = {}
    num_samples = 8
    statistics_batches = None

    def __init__(self, target: Tensor) -> None:
        self.target = target
        self.parts: list[tuple[int, int] | None] = []

    def measured(self, network: Any, part: tuple[int, int] | None = None) -> dict[str, Tensor]:
        self.parts.append(part)
        distances = (network.module.weight.detach() - self.target).square().flatten()
        values = torch.stack([part.mean() for part in distances.chunk(8)])
        return {"loss": values[slice(*part) if part else slice(None)]}

    def of_the_set(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return values

    def reestimate(self, network: Any) -> None:
        return

    def record(self, network: Any, averages: Any) -> dict[str, float]:
        record = {"eval/live/loss": float(self.measured(network)["loss"].mean())}
        for name, average in averages.items():
            with average.swapped_into(network.module):
                record[f"eval/ema/{name}/loss"] = float(self.measured(network)["loss"].mean())
        return record


@pytest.fixture
def evaluated() -> Iterator[Callable[..., tuple[dict[str, float], list[str]]]]:
    def evaluate(model: nn.Module, bank: EMABank, target: Tensor) -> tuple[dict[str, float], list[str]]:
        notes: list[str] = []
        bowl, network = Bowl(target), cast(Network, SimpleNamespace(module=model))
        axis = EvaluationOfAxis(cast(Evaluation, bowl), cast(Any, bowl.record), notes.append)
        before = cast(Tensor, model.weight).clone()
        for _ in range(2):  # a longer average is named once
            record = axis(network, cast(EMABank, Bank(bank)))
        assert torch.equal(cast(Tensor, model.weight), before)
        return record, notes

    yield evaluate


def test_the_optimum_in_between_is_evaluated(evaluated: Callable[..., Any]) -> None:
    def drifting(weight: Tensor) -> Tensor:
        return 0.9 * weight + 0.1 + torch.randn_like(weight)

    model, bank = walked(150, drifting)
    target = bank["tracked"].state_dict()["weight"]
    record, notes = evaluated(model, bank, target)
    tracked = {name: record[f"eval/ema/horizon_{name}/loss"] for name in (2, 4, 8, 16, 32)}
    assert 8 < record["axis/horizon"] < 16 and record["axis/decay"] == 1 - 1 / record["axis/horizon"]
    assert record["axis/loss"] < min(tracked.values()) / 4 and 0 < record["axis/predicted_error"] < 0.01
    assert notes == [] and "axis/longer_gap" not in record and "eval/ema/initial/loss" not in record


def test_a_better_longer_average_is_named_while_the_run_goes_on(evaluated: Callable[..., Any]) -> None:
    model, bank = walked(150, torch.randn_like)  # noise around 0: the longer the better
    record, (note,) = evaluated(model, bank, torch.zeros(40, 40))
    assert record["axis/horizon"] == 32 and record["axis/predicted_error"] == 0
    assert record["axis/loss"] == record["eval/ema/horizon_32/loss"]
    assert record["axis/longer_gap"] > 2 * record["axis/longer_gap_se"] > 0
    assert "the longest, of 32 steps" in note and "on the way to 64 steps loss goes down" in note


def test_no_longer_average_is_named_before_the_initial_weights_are_forgotten(
    evaluated: Callable[..., Any],
) -> None:
    model, bank = walked(63, torch.randn_like)
    record, notes = evaluated(model, bank, torch.zeros(40, 40))
    assert record["axis/horizon"] == 32 and "axis/longer_gap" not in record and notes == []


def test_a_longest_average_that_is_the_best_is_no_reason_for_a_longer_one(
    evaluated: Callable[..., Any],
) -> None:
    model, bank = walked(150, torch.randn_like)
    record, notes = evaluated(model, bank, bank["horizon_32"].state_dict()["weight"])
    assert record["axis/horizon"] == 32 and record["axis/longer_gap"] < 0 and notes == []


def test_the_live_weights_are_the_average_of_horizon_1(evaluated: Callable[..., Any]) -> None:
    model, bank = walked(150, diffusing)
    record, notes = evaluated(model, bank, cast(Tensor, model.weight).detach().clone())
    assert points_of(cast(EMABank, Bank(bank)))[0] == (1.0, "live")
    assert (record["axis/horizon"], record["axis/decay"], record["axis/loss"]) == (1.0, 0.0, 0.0)
    assert notes == []


def test_all_ranks_follow_rank_0_where_the_last_bit_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that takes another branch would wait in a forward that the others do not have."""
    model, bank = walked(150, torch.randn_like)
    network, answers = cast(Network, SimpleNamespace(module=model)), []

    def on_rank_0(work: Callable[[], Any], place: str) -> Any:
        answers.append(work())
        return answers[-1]

    def run(best: int) -> tuple[dict[str, float], list[Any]]:
        record = {f"eval/ema/horizon_{horizon}/loss": 1.0 for horizon in (2, 4, 8, 16, 32)}
        record |= {"eval/live/loss": 2.0, f"eval/ema/horizon_{best}/loss": 1 - 2**-53}
        bowl = Bowl(torch.zeros(40, 40))
        axis = EvaluationOfAxis(cast(Evaluation, bowl), lambda *_: dict(record), lambda _: None)
        made = axis(network, cast(EMABank, Bank(bank)))
        return {name: value for name, value in made.items() if name.startswith("axis/")}, bowl.parts

    monkeypatch.setattr("trainer.evaluation.axis.on_main", on_rank_0)
    first = run(best=32)
    replayed = iter(answers)
    monkeypatch.setattr("trainer.evaluation.axis.on_main", lambda work, place: next(replayed))
    assert run(best=8) == first and first[1] == [(0, 4), (0, 4)]
