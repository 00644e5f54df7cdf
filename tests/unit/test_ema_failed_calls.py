"""A call that is refused leaves the average, the model and the target as they were."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema import EMABank, EMAConfig, ExponentialMovingAverage, divergence, live_copy
from tests.makers import assert_same, averaged, network, shake

CONFIGS = {"a": EMAConfig(decay=0.5), "b": EMAConfig(decay=0.9, average_buffers=["*.running_mean"])}


def made() -> tuple[nn.Module, EMABank]:
    model = network(seed=3)
    bank = EMABank(model, CONFIGS)
    for iteration in range(2):
        shake(model)
        bank.update(model, iteration=iteration)
    shake(model)
    return model, bank


def stranger() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def renamed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.BatchNorm1d(4), nn.Linear(4, 2))


def on_meta() -> nn.Module:
    model = network()
    model[2].to_empty(device="meta")
    return model


def nested_buffer() -> nn.Module:
    model = network()
    model[1].running_var = torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)
    return model


def another_buffer() -> nn.Module:
    """One average of the bank follows the buffer, the other cannot."""
    model = network()
    model[1].running_mean = torch.ones(7)
    model[1].running_var = torch.ones(7)
    return model


def enter(average: ExponentialMovingAverage, model: nn.Module) -> None:
    with average.swapped_into(model):
        pass


def wrong_states(bank: EMABank) -> list[dict[str, Any]]:
    good = bank.state_dict(snapshot=True)
    broken = [{**good, "b/2.bias": torch.zeros(9)}, {**good, "b/_ema.counters": torch.zeros(5)}]
    broken.append({key: value for key, value in good.items() if key != "b/2.bias"})
    broken.append({**good, "b/2.bias": torch.ones(2).to_sparse()})
    broken.append({**good, "b/2.bias": good["b/2.bias"].to("meta")})
    return broken


CALLS: dict[str, Callable[[EMABank, nn.Module], object]] = {
    "bank.update": lambda bank, model: bank.update(model, iteration=2),
    "update": lambda bank, model: bank["b"].update(model, iteration=2),
    "swap": lambda bank, model: enter(bank["b"], model),
    "copy_to": lambda bank, model: bank["b"].copy_to(model),
    "bank.add": lambda bank, model: bank.add(model, "new", EMAConfig()),
}


@pytest.mark.parametrize(
    ("call", "other"),
    [
        (call, other)
        for call in CALLS
        for other in (stranger, renamed, on_meta, another_buffer, nested_buffer, nn.Flatten)
        if (call, other)
        != ("copy_to", nested_buffer)  # a target takes a copied buffer whatever it had before
    ],
)
def test_a_model_that_is_refused_changes_nothing(other: Callable[[], nn.Module], call: str) -> None:
    model, bank = made()
    twin_model, twin = made()
    wrong = other()
    before = bank.state_dict(snapshot=True)
    live = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((KeyError, ValueError)):
        CALLS[call](bank, wrong)
    assert_same(bank.state_dict(), before)
    for average in bank.values():
        if other in (stranger, renamed, on_meta, nn.Flatten):
            with pytest.raises((KeyError, ValueError)):
                average.copy_to(wrong)
        target = network()
        average.copy_to(target)
        reference = network()
        twin[next(name for name in bank if bank[name] is average)].copy_to(reference)
        assert_same(dict(target.state_dict()), dict(reference.state_dict()))
    assert_same(dict(model.state_dict()), live)
    for one, pair in ((model, bank), (twin_model, twin)):
        torch.manual_seed(7)
        shake(one)
        pair.update(one, iteration=2)
    assert_same(bank.state_dict(), twin.state_dict())


@pytest.mark.parametrize("measure", [divergence, live_copy])
def test_a_measurement_of_another_model_changes_nothing(measure: Callable[..., object]) -> None:
    _, bank = made()
    before = bank.state_dict(snapshot=True)
    for other in (stranger, renamed):
        with pytest.raises((KeyError, ValueError)):
            measure(bank, other())
        bank["a"].copy_to(network())
        with pytest.raises((KeyError, ValueError)):
            bank["a"].copy_to(other())
    assert_same(bank.state_dict(), before)


@pytest.mark.parametrize("number", range(5))
def test_a_state_that_is_refused_changes_no_average(number: int) -> None:
    _, bank = made()
    before = bank.state_dict(snapshot=True)
    broken = wrong_states(bank)[number]
    for key in ("a/0.weight", "a/2.bias"):
        broken[key] = torch.full_like(broken[key], 7)
    with pytest.raises((KeyError, ValueError)):
        bank.load_state_dict(broken)
    with pytest.raises((KeyError, ValueError)):
        bank["b"].load_state_dict({k.removeprefix("b/"): v for k, v in broken.items() if k.startswith("b/")})
    assert_same(bank.state_dict(), before)
    assert bank["b"].num_updates == 2


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_changes_nothing() -> None:
    model, bank = made()
    other = EMABank(model, {"a": EMAConfig(decay=0.5), "b": EMAConfig(decay=0.1)})
    before = other.state_dict(snapshot=True)
    with pytest.raises(UserWarning, match="another rule"):
        other.load_state_dict(bank.state_dict())
    assert not other["a"].started and not other["b"].started
    assert_same(other.state_dict(), before)
    with pytest.raises(UserWarning, match="has not started"):
        enter(other["a"], network())
    with pytest.raises(UserWarning, match="has not started"):
        other["a"].copy_to(network())


def test_a_rule_that_fails_changes_no_average_of_a_bank() -> None:
    def rule(t: int, config: EMAConfig) -> float:
        if t == 2:
            raise ZeroDivisionError
        return 0.5

    model = network(seed=3)
    configs = {"a": EMAConfig(decay=0.5), "b": EMAConfig(rule="mine")}
    bank = EMABank(model, configs, rules={"b": rule})
    for iteration in range(2):
        shake(model)
        bank.update(model, iteration=iteration)
    before = bank.state_dict(snapshot=True)
    shake(model)
    with pytest.raises(ZeroDivisionError):
        bank.update(model, iteration=2)
    assert_same(bank.state_dict(), before)
    bank.update(model, iteration=3)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_an_average_whose_update_failed_midway_is_not_used_until_a_state_is_loaded(
    device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of its tensors would be right, and their values of two different steps."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5, device=device, dtype=None))
    average.update(model, iteration=0)
    saved, real = average.state_dict(snapshot=True), Tensor.lerp_

    def failing(self: Tensor, *args: Any) -> Tensor:
        if self.dtype == torch.float64:
            raise MemoryError("no memory")
        return real(self, *args)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Tensor, "lerp_", failing)
        average.update(model, iteration=1)
        average.wait()
    for use in (
        lambda: average.update(model, iteration=2),
        lambda: average.copy_to(model),
        lambda: average.swapped_into(model).__enter__(),
        average.state_dict,
    ):
        with pytest.raises(RuntimeError, match="failed midway"):
            use()
    average.load_state_dict(saved)
    average.update(model, iteration=2)


def test_a_torn_average_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    average = averaged(model)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="out of memory"):
        broken.setattr(torch, "_foreach_lerp_", fail)
        broken.setattr(Tensor, "lerp_", fail)
        average.update(model, iteration=1)
    with pytest.raises(RuntimeError, match="failed midway"):
        divergence({"a": average}, model)
