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
from ema.posthoc import Snapshot
from ema.rounding import roundings
from ema.rules import profile
from tests.makers import refusal_of
from trainer.config.averages import axis_horizons, grown_averages, settle_averages, without_initial
from trainer.config.schema import Config, EMAGroupConfig, TrainerConfig
from trainer.distributed.sharding import Network
from trainer.evaluation.axis import EvaluationOfAxis, made, points_of, rounding_of
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
        ({"axis_grows": True, "snapshots": 4}, "ema.snapshots: "),
        ({"axis": 0, "axis_grows": True}, "ema.axis_grows: "),
    ],
)
def test_what_does_not_fit_the_axis_is_refused(choices: dict[str, Any], key: str) -> None:
    assert refusal_of(settle_averages, config(**choices)).startswith(key)


@pytest.mark.parametrize(
    ("steps", "count", "start", "further"),
    [
        (2000, 4, [2, 4, 8, 16], [32, 64, 128, 256]),
        (255, 4, [2, 4, 8, 16], [32]),  # 64 steps before one of 64 begins, and three times as many after
        (256, 4, [2, 4, 8, 16], [32, 64]),
        (2000, 10, [2, 4, 8, 16, 32, 64, 128, 256, 512], []),
    ],
)
def test_a_bank_that_grows_begins_short(steps: int, count: int, start: list[int], further: list[int]) -> None:
    grows = config(steps, axis=count, axis_grows=True)
    assert [*settle_averages(grows)] == [*(f"horizon_{horizon}" for horizon in start), "initial"]
    assert [*grown_averages(grows)] == [f"horizon_{horizon}" for horizon in further]
    assert [one.decay for one in grown_averages(grows).values()] == [1 - 1 / horizon for horizon in further]
    assert grown_averages(config(steps, axis=count)) == {}


TRACKED = 11.3
"""Horizon between those of the bank, which is tracked too."""


def walked(
    steps: int,
    path: Callable[[Tensor], Tensor],
    skipped: tuple[int, ...] = (),
    tracked: float = TRACKED,
) -> tuple[nn.Module, EMABank]:
    """A model whose weights moved at random, with averages over the way of horizons 2 to 32, and a tracked one."""
    torch.manual_seed(0)
    model = nn.Linear(40, 40, bias=False).double()
    configs = {f"horizon_{h}": EMAConfig(decay=1 - 1 / h, dtype="float64") for h in (2, 4, 8, 16, 32)}
    configs["initial"] = EMAConfig(decay=1.0, dtype="float64")
    configs["tracked"] = EMAConfig(decay=1 - 1 / tracked, dtype="float64")
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
        self.bank = bank

    def add(self, model: nn.Module, name: str, config: EMAConfig) -> Any:
        self[name] = self.bank.add(model, name, config)
        return self[name]


@pytest.mark.parametrize(("steps", "skipped"), [(150, ()), (16, (2, 5, 9, 10, 11, 15))])
def test_a_made_average_agrees_with_a_tracked_one_as_predicted(steps: int, skipped: tuple[int, ...]) -> None:
    model, bank = walked(steps, diffusing, skipped)
    choice = made(cast(EMABank, Bank(bank)), TRACKED, None)
    found = bank.combined(model, choice.coefficients, choice.live)["weight"]
    tracked = bank["tracked"].state_dict()["weight"]
    error = float((found - tracked).norm() / (tracked - cast(Tensor, model.weight).detach()).norm())
    assert found.dtype == torch.float64
    assert choice.error < 0.01 and 0.5 < error / choice.error < 2


def young(steps: int, dtype: str, horizon: float) -> tuple[nn.Module, EMABank, Tensor]:
    """A bank soon after its start, with its model and the average of another horizon in float64."""
    torch.manual_seed(0)
    model = nn.Linear(40, 40, bias=False)
    configs = {f"horizon_{2**n}": EMAConfig(decay=1 - 2**-n, dtype=dtype) for n in range(1, 11)}
    bank = EMABank(model, configs | {"initial": EMAConfig(decay=1.0, dtype=dtype)})
    bank.update(model, iteration=0)
    average = model.weight.detach().double()
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight.add_(1e-4 * torch.randn_like(model.weight))
        bank.update(model, iteration=step)
        average += (model.weight.detach() - average) / horizon
    return model, bank, average


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 0.01), ("bfloat16", 1.1)])
@pytest.mark.parametrize("steps", [7, 9, 19])
def test_the_rounding_of_a_young_bank_is_not_enlarged_and_is_predicted(
    steps: int, dtype: str, limit: float
) -> None:
    """Soon after the start all averages are nearly combinations of others; without their rounding it is enlarged."""
    model, bank, average = young(steps, dtype, 2.7)
    far = (average - cast(Tensor, model.weight).detach()).norm()

    def off(rounding: list[float] | None) -> tuple[float, float]:
        choice = made(bank, 2.7, rounding)
        found = bank.combined(model, choice.coefficients, choice.live)["weight"]
        return choice.error, float((found - average).norm() / far)

    predicted, real = off(None)
    assert real > 50 * predicted and real > 0.01
    predicted, real = off(rounding_of(bank, model))
    assert predicted / 30 < real < 3 * predicted and predicted < limit


def test_a_long_average_of_a_bank_counts_as_rounded_by_all_its_updates() -> None:
    model, bank, _ = young(300, "float32", 2.7)
    found = dict(zip([*bank, "live"], rounding_of(bank, model) or [], strict=True))
    (updates,) = roundings([Snapshot(300, bank["horizon_1024"].config)])
    assert found["live"] == found["horizon_2"] == found["initial"] > 0
    assert found["horizon_1024"] / found["live"] == pytest.approx(updates) and updates > 3


def test_the_record_has_the_rounding_in_the_predicted_error(evaluated: Callable[..., Any]) -> None:
    model, bank, average = young(9, "float32", 2.7)
    record, _ = evaluated(model, bank, average)
    assert 2 < record["axis/horizon"] < 4 and 1e-6 < record["axis/predicted_error"] < 0.01
    assert record["axis/loss"] < record["eval/ema/horizon_2/loss"] / 4


def test_a_bank_that_has_not_moved_shows_no_step_and_one_that_is_not_finite_neither() -> None:
    model, bank = walked(0, diffusing)
    assert rounding_of(bank, model) is None
    model, bank = walked(3, lambda weight: weight)
    assert rounding_of(bank, model) is not None
    bank.update(model, iteration=4)
    with torch.no_grad():
        cast(Tensor, model.weight).fill_(torch.nan)
    assert rounding_of(bank, model) is None


def test_skipped_steps_do_not_count() -> None:
    found, expected = (
        made(cast(EMABank, Bank(walked(steps, diffusing, skipped)[1])), TRACKED, None)
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
    for ask in (lambda: bank["c"], lambda: bank.combined(model, {"a": 1.0, "c": 1.0})):
        with pytest.raises(KeyError, match=r"EMABank: expected one of \['a', 'b'\], got 'c'"):
            ask()
    assert "c" not in bank and bank.get("c") is None and bank.get("a") is bank["a"]


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


FURTHER = {f"horizon_{horizon}": EMAConfig(decay=1 - 1 / horizon, dtype="float64") for horizon in (64, 128)}


def growing(
    model: nn.Module, bank: Bank, target: Tensor, steps: int
) -> tuple[EvaluationOfAxis, list[str], Any]:
    """An evaluation that may add averages to the bank, its notes, and a call of it."""
    notes: list[str] = []
    bowl, network = Bowl(target), cast(Network, SimpleNamespace(module=model))
    axis = EvaluationOfAxis(
        cast(Evaluation, bowl), cast(Any, bowl.record), notes.append, further=FURTHER, steps=steps
    )
    return axis, notes, lambda: axis(network, cast(EMABank, bank))


def walk_on(model: nn.Module, bank: EMABank, steps: range, path: Callable[[Tensor], Tensor]) -> None:
    for step in steps:
        with torch.no_grad():
            cast(Tensor, model.weight).copy_(path(cast(Tensor, model.weight)))
        bank.update(model, iteration=step)


def test_a_bank_grows_by_the_next_horizon_which_counts_once_it_has_forgotten_its_first_weights() -> None:
    model, whole = walked(150, torch.randn_like)
    bank, zero = Bank(whole), torch.zeros(40, 40)
    _, notes, evaluate = growing(model, bank, zero, steps=1000)
    evaluate()
    added = bank["horizon_64"]
    assert (added.num_updates, added.last_iteration) == (1, 150)
    assert torch.equal(added.state_dict()["weight"], cast(Tensor, model.weight))
    assert "on the way to 64 steps loss goes down" in notes[0] and notes[0].endswith("horizon_64 begins now")
    walk_on(model, whole, range(151, 342), torch.randn_like)
    record = evaluate()
    # It is evaluated, but 32 is the longest horizon yet, and the next one is there already: nothing else begins.
    assert "eval/ema/horizon_64/loss" in record and record["axis/horizon"] <= 32
    assert [*bank][-1] == "horizon_64" and len(notes) == 1
    walk_on(model, whole, range(342, 343), torch.randn_like)
    assert points_of(cast(EMABank, bank))[-1] == (64.0, "horizon_64")
    assert evaluate()["axis/horizon"] == 64
    walk_on(model, whole, range(343, 601), torch.randn_like)
    assert evaluate()["axis/horizon"] == 64
    assert (bank["horizon_128"].num_updates, bank["horizon_128"].last_iteration) == (1, 600)
    assert notes[1:] == [note for note in notes[1:] if note.endswith("horizon_128 begins now")] != []


@pytest.mark.parametrize(("steps", "grows"), [(342, True), (341, False)])
def test_an_average_that_could_not_forget_its_first_weights_is_not_added(steps: int, grows: bool) -> None:
    model, whole = walked(150, torch.randn_like)
    bank = Bank(whole)
    _, notes, evaluate = growing(model, bank, torch.zeros(40, 40), steps)
    evaluate()
    evaluate()
    assert ("horizon_64" in bank) is grows
    assert [note.endswith("a longer run keeps longer averages") for note in notes] == [not grows]


def test_a_bank_does_not_grow_if_no_longer_average_is_better() -> None:
    model, whole = walked(150, torch.randn_like)
    bank = Bank(whole)
    _, notes, evaluate = growing(model, bank, whole["horizon_32"].state_dict()["weight"].clone(), steps=1000)
    assert evaluate()["axis/longer_gap"] < 0
    assert notes == [] and "horizon_64" not in bank


def test_rank_0_decides_whether_the_bank_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole = walked(150, torch.randn_like)
    bank = Bank(whole)
    target = whole["horizon_32"].state_dict()["weight"].clone()  # here a longer one is worse
    _, _, evaluate = growing(model, bank, target, steps=1000)
    monkeypatch.setattr(
        "trainer.evaluation.axis.on_main",
        lambda work, place: True if place == "adding a longer average" else work(),
    )
    evaluate()
    assert "horizon_64" in bank


def test_decays_beyond_are_made_from_an_average_that_began_later() -> None:
    model, whole = walked(150, diffusing, tracked=45.0)
    whole.add(model, "horizon_64", FURTHER["horizon_64"]).update(model, iteration=150)
    walk_on(model, whole, range(151, 343), diffusing)
    bank = Bank(whole)
    choice = made(cast(EMABank, bank), 45.0, None)
    found = whole.combined(model, choice.coefficients, choice.live)["weight"]
    tracked = whole["tracked"].state_dict()["weight"]
    error = float((found - tracked).norm() / (tracked - cast(Tensor, model.weight).detach()).norm())
    assert 0.5 < error / choice.error < 2
    del bank["horizon_64"]
    assert choice.error < made(cast(EMABank, bank), 45.0, None).error / 2


def test_a_name_of_the_bank_cannot_be_added_again() -> None:
    model, whole = walked(1, diffusing)
    before = whole["horizon_2"]
    for name, text in (("horizon_2", "expected a new name"), ("a/b", "without '/'")):
        with pytest.raises(ValueError, match=text):
            whole.add(model, name, EMAConfig())
    assert whole["horizon_2"] is before
