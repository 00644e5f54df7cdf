"""The average in the live model's place: exact inside, bit for bit as before outside."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from ema import EMABank, EMAConfig, ExponentialMovingAverage, divergence, is_swapped
from tests.makers import assert_same, averaged, network, shake


def tracked(dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, ExponentialMovingAverage]:
    model = network().to(dtype)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.9))
    for step in range(3):
        shake(model)
        model(torch.randn(6, 3, dtype=dtype))
        average.update(model, iteration=step)
    shake(model)
    model(torch.randn(6, 3, dtype=dtype))
    return model, average


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in values(model).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_buffers_are_the_average_inside_and_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    model, average = tracked(dtype)
    with torch.no_grad():
        # Values that arithmetic would not bring back.
        model[0].weight[0] = torch.tensor([float("nan"), -0.0, 1e-40], dtype=dtype)
    before, objects = bits(model), [*model.parameters(), *model.buffers()]
    with average.swapped_into(model):
        state = average.state_dict()
        for name, tensor in values(model).items():
            assert torch.equal(tensor, state[name].to(tensor.dtype)), name
    assert_same(bits(model), before)
    assert all(
        now is then for now, then in zip([*model.parameters(), *model.buffers()], objects, strict=True)
    )


def test_an_exception_inside_restores_too() -> None:
    model, average = tracked()
    before = values(model)
    with pytest.raises(ZeroDivisionError), average.swapped_into(model):
        raise ZeroDivisionError
    assert_same(values(model), before)
    assert not is_swapped(model)


def test_what_happens_to_the_weights_and_buffers_inside_is_undone() -> None:
    model, average = tracked()
    before, shadow = values(model), average.state_dict(snapshot=True)
    with average.swapped_into(model):
        shake(model)
        model(torch.randn(5, 3))
        model[1].running_mean = torch.zeros(4)
    assert_same(values(model), before)
    assert_same(shadow, average.state_dict())  # the shadow is not the storage that was swapped in


def test_nesting_is_refused_also_with_another_average_or_a_part_of_the_model() -> None:
    model, average = tracked()
    other = ExponentialMovingAverage(model, EMAConfig(decay=0.5))
    part = ExponentialMovingAverage(model[0], EMAConfig(decay=0.5))
    stranger = network()
    foreign = ExponentialMovingAverage(stranger, EMAConfig(decay=0.5))
    foreign.update(stranger, iteration=0)
    before = values(model)
    with average.swapped_into(model):
        for second, target in ((average, model), (other, model), (part, model[0]), (foreign, model)):
            with (
                pytest.raises(RuntimeError, match="cannot swap an average in while"),
                second.swapped_into(target),
            ):
                pass
        assert torch.equal(model[0].weight, average.state_dict()["0.weight"])
    assert_same(values(model), before)


def test_whatever_would_mistake_the_average_for_the_live_weights_is_refused_inside() -> None:
    model, average = tracked()
    bank = EMABank(model, {"a": EMAConfig(decay=0.5)})
    with average.swapped_into(model):
        for action in (
            lambda: average.update(model, iteration=9),
            lambda: bank.update(model, iteration=9),
            lambda: average.load_state_dict(average.state_dict()),
            lambda: average.copy_to(network()),
            lambda: bank["a"].copy_to(model),
            lambda: divergence(bank, model),
            lambda: EMABank(model, {"late": EMAConfig()}),
        ):
            with pytest.raises(RuntimeError, match="swapped into"):
                action()
    average.update(model, iteration=9)


def test_is_swapped_is_true_while_the_model_must_not_be_saved() -> None:
    model, average = tracked()
    wrapped, stranger = nn.DataParallel(model), network()
    assert not is_swapped(model)
    with average.swapped_into(model):
        assert is_swapped(model) and is_swapped(wrapped) and is_swapped(model[0])
        assert not is_swapped(stranger)
    assert not is_swapped(model)


def test_the_next_optimizer_step_is_untouched() -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        torch.manual_seed(5)
        model(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, average = tracked()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, twin)]
    step(model, optimizers[0]), step(twin, optimizers[1])
    with average.swapped_into(model), torch.no_grad():
        model.eval()
        model(torch.randn(4, 3))
        model.train()
    step(model, optimizers[0]), step(twin, optimizers[1])
    assert_same(values(model), values(twin))


def test_a_compiled_forward_sees_the_swapped_weights() -> None:
    model, average = tracked()
    model.eval()
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(5, 3)
    published = network().eval()
    average.copy_to(published)
    with torch.no_grad():
        live = compiled(x).clone()
        with average.swapped_into(model):
            torch.testing.assert_close(compiled(x), published(x))
        assert torch.equal(compiled(x), live)
    assert not torch.allclose(live, published(x))


def test_the_autocast_cache_does_not_keep_the_live_weights() -> None:
    """Autocast caches bf16 copies of fp32 leaves as long as its context lasts."""
    model, average = tracked()
    model.eval()
    published = network().eval()
    average.copy_to(published)
    x = torch.randn(5, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        live = model(x)
        with average.swapped_into(model):
            inside = model(x)
        assert torch.equal(model(x), live)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(inside, published(x))


def test_a_model_that_does_not_fit_is_refused_before_it_is_touched() -> None:
    _, average = tracked()
    stranger = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    before = values(stranger)
    with pytest.raises(ValueError, match=r"'2\.weight': expected shape"), average.swapped_into(stranger):
        pass
    assert_same(values(stranger), before)
    assert not is_swapped(stranger)


def test_a_buffer_that_consists_of_other_tensors_comes_back_from_a_swap() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("pair", TwoTensor(torch.zeros(20, 20), torch.ones(20, 20)))
    average = averaged(model)
    model.pair = TwoTensor(torch.full((20, 20), 8.0), torch.full((20, 20), 9.0))
    with average.swapped_into(model):
        assert (model.pair.a[0, 0], model.pair.b[0, 0]) == (0, 1)
    assert (model.pair.a[0, 0], model.pair.b[0, 0]) == (8, 9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantised_buffer_with_another_scale_comes_back_from_a_swap() -> None:
    def quantised(value: float, scale: float) -> Tensor:
        return torch.quantize_per_tensor(torch.full((2,), value), scale, 0, torch.qint8)

    model = nn.Linear(2, 2)
    model.register_buffer("scaled", quantised(1.0, 0.1))
    average = averaged(model)
    model.scaled = quantised(2.0, 0.5)
    with average.swapped_into(model):
        assert model.scaled.dequantize().allclose(torch.ones(2))
    assert model.scaled.dequantize().tolist() == [2, 2]


def test_averaged_buffers_are_copied_in_the_dtype_of_the_target() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).bfloat16()
    target = copy.deepcopy(model)
    averaged(model, EMAConfig(average_buffers=["*"])).copy_to(target)
    assert target[1].running_mean.dtype == torch.bfloat16
    target(torch.ones(3, 2, dtype=torch.bfloat16))


def test_a_target_that_cannot_be_written_is_refused_before_anything_is_written() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    average = averaged(model)
    lazy = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2))
    sparse = copy.deepcopy(model)
    sparse[1].weight = nn.Parameter(sparse[1].weight.detach().to_sparse())
    for target, complaint in ((lazy, "'0.weight' is a lazy tensor"), (sparse, "'1.weight': expected layout")):
        with pytest.raises(ValueError, match=complaint):
            average.copy_to(target)
    model[1].requires_grad_(False)
    average = averaged(model)
    model[1].to("meta")
    target = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = target[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"'1.weight'.* meta tensor"):
        average.copy_to(target)
    assert torch.equal(target[0].weight, before)
