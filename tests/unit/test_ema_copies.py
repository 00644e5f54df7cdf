"""A copied buffer has no history: its copy follows it in values, shape and dtype, and in being None."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from ema import EMABank, EMAConfig, ExponentialMovingAverage
from tests.makers import assert_same


class Growing(nn.Module):
    """A linear layer with a buffer that the test replaces."""

    def __init__(self, value: Tensor | None) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("memory", value)


VALUES = {
    "none": None,
    "longer": torch.arange(5.0),
    "shorter": torch.ones(1),
    "empty": torch.zeros(0),
    "scalar": torch.tensor(2.0),
    "matrix": torch.randn(3, 2),
    "double": torch.arange(3.0, dtype=torch.float64) / 3,
    "half": torch.arange(3.0, dtype=torch.bfloat16),
    "whole": torch.tensor([1, 2**62 + 1, 3]),
    "flags": torch.tensor([True, False]),
    "complex": torch.randn(3, dtype=torch.complex64),
    "expanded": torch.arange(3.0).expand(2, 3),
    "sparse": torch.eye(3).to_sparse(),
    "same": torch.arange(3.0),
}


def same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    one, other = one.to_dense(), other.to_dense()
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("device", [None, "cpu"], ids=["here", "host"])
@pytest.mark.parametrize("late", VALUES)
@pytest.mark.parametrize("early", ["none", "same", "whole", "expanded"])
def test_a_copy_follows_the_buffer_exactly(early: str, late: str, device: str | None) -> None:
    if device == "cpu" and late == "sparse":
        pytest.skip("refused, see test_ema_kinds.py")
    model = Growing(VALUES[early])
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5, device=device))
    average.update(model, iteration=0)
    for iteration, name in enumerate([late, early, late], 1):
        model.memory = VALUES[name]
        average.update(model, iteration=iteration)
        assert same(average.state_dict().get("memory"), VALUES[name])
    live = torch.full((4,), 9.0)
    model.memory = live
    with average.swapped_into(model):
        inside = model.memory
        assert same(inside, VALUES[late]) or (
            inside is not None and same(inside, VALUES[late].to(inside.dtype))
        )  # type: ignore[union-attr]
    assert model.memory is live and torch.equal(live, torch.full((4,), 9.0))
    for start in ("none", "same", late):
        target = Growing(copy.deepcopy(VALUES[start]))
        average.copy_to(target)
        assert same(target.memory, VALUES[late])
    for start in (early, "none"):
        again = ExponentialMovingAverage(Growing(copy.deepcopy(VALUES[start])), EMAConfig(decay=0.5))
        if late == "none" and start != "none":
            with pytest.raises(KeyError, match="the state lacks 'memory'"):
                again.load_state_dict(average.state_dict())
            continue
        again.load_state_dict(average.state_dict())
        assert same(again.state_dict().get("memory"), VALUES[late])
        target = Growing(None)
        again.copy_to(target)
        assert same(target.memory, VALUES[late])
    average.update(model, iteration=9)
    assert same(average.state_dict()["memory"], live)


def test_a_buffer_that_is_a_tensor_later_has_a_place_in_every_average_of_a_bank() -> None:
    model = Growing(None)
    configs = {"a": EMAConfig(decay=0.5), "b": EMAConfig(update_every=2), "late": EMAConfig(start_iter=3)}
    bank = EMABank(model, configs)
    bank.update(model, iteration=0)
    model.memory = torch.ones(3)
    bank.update(model, iteration=1)
    assert same(bank["a"].state_dict()["memory"], torch.ones(3))
    assert "memory" not in bank["b"].state_dict()
    assert same(bank["late"].state_dict()["memory"], torch.ones(3))
    with bank["b"].swapped_into(model):
        assert model.memory is None
    assert same(model.memory, torch.ones(3))
    model.memory = torch.ones(4)
    bank.update(model, iteration=2)
    bank.update(model, iteration=3)
    assert all(same(average.state_dict()["memory"], torch.ones(4)) for average in bank.values())
    other = EMABank(Growing(None), configs)
    other.load_state_dict(bank.state_dict())
    assert_same(other.state_dict(), bank.state_dict())


def test_before_the_start_the_live_buffer_is_published() -> None:
    model, target = Growing(None), Growing(None)
    average = ExponentialMovingAverage(model, EMAConfig(start_iter=9))
    model.memory = torch.ones(3)
    average.update(model, iteration=0)
    with pytest.warns(UserWarning, match="has not started"):
        average.copy_to(target)
    assert same(target.memory, torch.ones(3))
    with pytest.warns(UserWarning, match="has not started"), average.swapped_into(model):
        model.memory = torch.zeros(2)
    assert same(model.memory, torch.ones(3))


def test_a_step_that_was_not_taken_does_not_change_the_copy() -> None:
    model = Growing(torch.ones(3))
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    model.memory = torch.zeros(5)
    average.update(model, iteration=1, finite=False)
    assert same(average.state_dict()["memory"], torch.ones(3))


def test_a_buffer_that_is_to_be_averaged_and_was_none_is_refused_by_name() -> None:
    model = Growing(None)
    model.register_buffer("mean", torch.ones(2))
    average = ExponentialMovingAverage(model, EMAConfig(average_buffers=["*me*"]))
    average.update(model, iteration=0)
    model.memory = torch.ones(3)
    with pytest.raises(KeyError, match="unexpected 'memory'"):
        average.update(model, iteration=1)
    model.memory = None
    average.update(model, iteration=1)


def test_two_buffers_that_become_one_tensor_later_follow_it() -> None:
    model = Growing(None)
    model.register_buffer("again", None)
    model.register_buffer("known", torch.ones(2))
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    model.memory = model.again = model.known
    average.update(model, iteration=1)
    model.known.add_(1)
    average.update(model, iteration=2)
    state = average.state_dict()
    assert all(same(state[name], torch.full((2,), 2.0)) for name in ("memory", "again", "known"))
    live = model.known
    with average.swapped_into(model):
        pass
    assert model.memory is model.again is live
    target = Growing(None)
    target.register_buffer("again", None)
    target.register_buffer("known", torch.ones(2))
    average.copy_to(target)
    assert all(same(getattr(target, name), state[name]) for name in ("memory", "again", "known"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        average.load_state_dict(average.state_dict(snapshot=True))


def test_a_copy_of_an_average_follows_too() -> None:
    model = Growing(None)
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    twin_model, twin = copy.deepcopy((model, average))
    twin_model.memory = torch.ones(3)
    twin.update(twin_model, iteration=1)
    assert same(twin.state_dict()["memory"], torch.ones(3))
    assert "memory" not in average.state_dict()
