"""A tensor that was replaced after the average was made is noticed: stale weights are never averaged.

At decay 0 the shadow is what the update saw, so the expected value is the new tensor itself.
"""

import pytest
import torch
from torch import nn

import ema.layout
import ema.track
from ema import EMABank, EMAConfig, ExponentialMovingAverage, divergence
from tests.makers import network


def replace_parameter(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.full((4, 3), 5.0))


def load_with_assign(model: nn.Sequential) -> None:
    state = {name: torch.full_like(value, 5) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def swap_storage(model: nn.Sequential) -> None:
    model[0].weight.data = torch.full((4, 3), 5.0)


def replace_module(model: nn.Sequential) -> None:
    model[0] = nn.Linear(3, 4)
    nn.init.constant_(model[0].weight, 5.0)


def empty_and_fill(model: nn.Sequential) -> None:
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(5)


def round_trip_of_dtypes(model: nn.Sequential) -> None:
    model.to(torch.bfloat16).to(torch.float32)
    nn.init.constant_(model[0].weight, 5.0)


def stay_bfloat16(model: nn.Sequential) -> None:
    model.to(torch.bfloat16)
    nn.init.constant_(model[0].weight, 5.0)


@pytest.mark.parametrize("accelerator", [False, True], ids=["cpu", "accelerator"])
@pytest.mark.parametrize("small", [0, 5, 1 << 14], ids=["one_by_one", "some_packed", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "change",
    [
        replace_parameter,
        load_with_assign,
        swap_storage,
        replace_module,
        empty_and_fill,
        round_trip_of_dtypes,
        stay_bfloat16,
    ],
)
def test_replaced_storage_is_noticed(
    monkeypatch: pytest.MonkeyPatch, change: object, dtype: str, small: int, accelerator: bool
) -> None:
    """An update that held on to the old tensor would average stale weights; also where views of pieces are kept."""
    monkeypatch.setitem(ema.layout.SMALL, "cpu", small)
    if accelerator:  # tensors of another dtype are cast many at a time, in batches of at most ten elements
        monkeypatch.delitem(ema.layout.PIECE, "cpu")
        monkeypatch.setattr(ema.layout, "PIECE_ELSEWHERE", 10)
    else:
        monkeypatch.setitem(ema.layout.PIECE, "cpu", 5)
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.0, dtype=dtype))
    for iteration in range(3):
        average.update(model, iteration=iteration)
    change(model)  # type: ignore[operator]
    average.update(model, iteration=3)
    assert torch.equal(average.state_dict()["0.weight"].float(), torch.full((4, 3), 5.0))


def test_a_parameter_in_the_place_of_none_is_noticed() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False))
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    model[0].bias = nn.Parameter(torch.zeros(4))
    with pytest.raises(KeyError, match=r"the model has unexpected '0.bias'"):
        average.update(model, iteration=1)


def test_a_parameter_under_another_name_is_noticed() -> None:
    """As many entries as before, and the same tensors: only the name differs."""
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    model[2].register_parameter("offset", model[2].bias)
    del model[2].bias
    with pytest.raises(KeyError, match=r"the model lacks '2.bias'; the model has unexpected '2.offset'"):
        average.update(model, iteration=1)


@pytest.mark.parametrize("small", [0, 1 << 14], ids=["one_by_one", "packed"])
def test_storage_of_another_shape_behind_the_same_parameter_is_refused(
    monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    monkeypatch.setitem(ema.layout.SMALL, "cpu", small)
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    model[0].weight.data = torch.zeros(1, 3)
    with pytest.raises(ValueError, match=r"'0.weight': expected shape \(4, 3\), got \(1, 3\)"):
        average.update(model, iteration=1)


def test_tensors_that_exchange_their_shapes_are_refused() -> None:
    """Together they fill the same scratch as before."""
    model = nn.ParameterDict({"a": torch.zeros(4, 3), "b": torch.zeros(2, 3), "c": torch.zeros(1, 3)})
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    model["b"].data, model["c"].data = torch.ones(1, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"'b': expected shape \(2, 3\), got \(1, 3\)"):
        average.update(model, iteration=1)


def test_layers_that_were_cast_later_are_averaged_in_full_precision() -> None:
    """Norms and heads of a bfloat16 model are often kept in float32; 1.001 is not a bfloat16."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)).bfloat16()
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.0))
    average.update(model, iteration=0)
    model[2].float()
    nn.init.constant_(model[2].weight, 1.001)
    average.update(model, iteration=1)
    assert torch.equal(average.state_dict()["2.weight"], model[2].weight)


def test_a_transposed_storage_behind_the_same_parameter_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ema.layout.SMALL, "cpu", 0)
    model = nn.Linear(3, 3).bfloat16()
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.0))
    for iteration in range(2):
        average.update(model, iteration=iteration)
    model.weight.data = model.weight.data.t()
    average.update(model, iteration=2)
    assert torch.equal(average.state_dict()["weight"], model.weight.float())


def test_a_model_that_was_elsewhere_and_came_back_is_averaged_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test moves each shadow as for another device, reads the average there, and then the model returns."""
    model = nn.Linear(4, 4)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.0))
    average.update(model, iteration=0)
    with monkeypatch.context() as patch:
        patch.setattr(ema.track, "home", lambda *_: torch.device("meta"))
        patch.setattr(ema.track, "moved", lambda tensor, device: tensor.clone())
        with average.swapped_into(model):
            pass
    nn.init.constant_(model.weight, 7.0)
    average.update(model, iteration=1)
    assert torch.equal(average.state_dict()["weight"], torch.full((4, 4), 7.0))


def test_buffers_that_are_not_tied_any_more_are_noticed() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model[1].running_mean = model[0].running_mean
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    model[1].running_mean = torch.ones(2)
    with pytest.raises(ValueError, match="were tied when the average was made"):
        average.update(model, iteration=1)


def test_an_average_that_began_in_inference_mode_goes_on_outside() -> None:
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5))
    with torch.inference_mode():
        average.update(model, iteration=0)
    average.update(model, iteration=1)
    assert average.num_updates == 2


def test_a_replaced_parameter_of_another_shape_is_refused_by_name() -> None:
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    model[0].weight = nn.Parameter(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"'0.weight': expected shape \(4, 3\), got \(1, 3\)"):
        average.update(model, iteration=1)
    assert average.last_iteration == 0


def test_an_averaged_buffer_of_another_shape_is_refused_by_name() -> None:
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig(average_buffers=["*.running_mean"]))
    average.update(model, iteration=0)
    model[1].running_mean = torch.zeros(1)
    with pytest.raises(ValueError, match=r"'1.running_mean': expected shape \(4,\), got \(1,\)"):
        average.update(model, iteration=1)


def test_a_parameter_that_came_later_is_refused_by_name() -> None:
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    model[2].register_parameter("scale", nn.Parameter(torch.ones(2)))
    with pytest.raises(KeyError, match=r"the model has unexpected '2.scale'"):
        average.update(model, iteration=1)


def test_an_empty_parameter_that_grows_is_refused() -> None:
    model = network()
    model.bank = nn.Parameter(torch.zeros(0, 4))
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5))
    average.update(model, iteration=0)
    model.bank.data = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"'bank': expected shape \(0, 4\), got \(3, 4\)"):
        average.update(model, iteration=1)


@pytest.mark.parametrize("offloaded", [False, True])
def test_an_average_added_after_a_change_of_memory_format_has_elements_in_their_places(
    offloaded: bool,
) -> None:
    model = nn.Conv2d(32, 64, 3, bias=False).bfloat16()  # too large to be packed
    device = "cpu" if offloaded else None
    bank = EMABank(model, {"a": EMAConfig(decay=0.5, device=device, update_every=2)})
    bank.update(model, iteration=0)
    model.to(memory_format=torch.channels_last)
    bank.add(model, "b", EMAConfig(decay=0.9, device=device))
    for iteration in range(1, 5):
        bank.update(model, iteration=iteration)
    for average in bank.values():
        assert torch.equal(average.state_dict()["weight"], model.weight.float())


def test_inference_mode_leaves_nothing_behind_that_fails_outside_it() -> None:
    model = nn.BatchNorm1d(3)
    model.register_buffer("queue", torch.zeros(2))
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5, start_iter=2))
    average.update(model, iteration=0)
    model.queue = torch.ones(5)
    with torch.inference_mode():
        average.state_dict(snapshot=True)
    average.update(model, iteration=2)
    with torch.inference_mode():
        inside = divergence({"a": average}, model)
    assert divergence({"a": average}, model) == inside
