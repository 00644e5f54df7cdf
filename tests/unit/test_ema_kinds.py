"""Tensors that have no average are refused by name, when it is made or when they become such tensors later."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from ema import EMAConfig, ExponentialMovingAverage
from tests.makers import averaged


def with_parameter(value: Tensor) -> nn.Module:
    model = nn.Linear(2, 2)
    model.odd = nn.Parameter(value)
    return model


def with_buffer(value: Tensor) -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_buffer("odd", value)
    return model


def placeholder() -> nn.Module:
    """As DeepSpeed ZeRO-3 leaves a parameter between uses."""
    model = with_parameter(torch.empty(0))
    model.odd.ds_id, model.odd.ds_shape = 0, torch.Size([4, 4])
    return model


def flat() -> nn.Module:
    model = with_parameter(torch.ones(8))
    model.odd._is_flat_param = True
    return model


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), r"'0.weight' is a lazy tensor .*: run one forward"),
    "lazy_buffer": (lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False)), "lazy tensor"),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), "'weight': .* meta tensor; materialise the model"),
    "sparse": (lambda: with_parameter(torch.eye(3).to_sparse()), r"'odd' has layout .*: exclude it"),
    "compressed": (lambda: with_parameter(torch.eye(3).to_sparse_csr()), "'odd' has layout .*: exclude it"),
    "mkldnn": (lambda: with_buffer(torch.eye(3).to_mkldnn()), "'odd' has layout .*: exclude it"),
    "nested": (lambda: with_parameter(nested()), "'odd' is a nested tensor: exclude it"),
    "nested_buffer": (lambda: with_buffer(nested()), "'odd' is a nested tensor: exclude it"),
    "half_complex": (
        lambda: with_parameter(torch.zeros(2, dtype=torch.complex32)),
        "'odd' has dtype torch.complex32, .*: exclude it",
    ),
    "zero3": (placeholder, r"'odd' is a placeholder of DeepSpeed ZeRO-3: .* shard the model with FSDP2"),
    "fsdp1": (flat, r"'odd' is a parameter of FSDP1: .* shard the model with FSDP2 \(fully_shard\)"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_average_is_refused_by_name_in_one_line(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as refused:
        ExponentialMovingAverage(make(), EMAConfig())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", ["counters", "rule"])
def test_a_tensor_whose_name_the_saved_form_reserves_is_refused(key: str) -> None:
    model = nn.Sequential()
    model.add_module("_ema", nn.Module())
    model[0].register_parameter(key, nn.Parameter(torch.ones(5)))
    model.append(nn.Linear(1, 1))
    refused = f"'_ema.{key}': the saved form of an average reserves this name"
    with pytest.raises(ValueError, match=refused):
        ExponentialMovingAverage(model, EMAConfig())
    ExponentialMovingAverage(model, EMAConfig(exclude=["_ema.*"]))
    setattr(model[0], key, None)
    model[0].register_buffer(f"{key}_of_mine", torch.ones(1))
    ExponentialMovingAverage(model, EMAConfig())
    del model[0]._parameters[key]
    model[0].register_buffer(key, None)  # it may be a tensor later
    with pytest.raises(ValueError, match=refused):
        ExponentialMovingAverage(model, EMAConfig())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_averaged_in_a_wider_dtype_and_refused_in_its_own(dtype: torch.dtype) -> None:
    model = with_parameter(torch.tensor([1.0, 2.0]).to(dtype))
    with pytest.raises(
        ValueError, match=r"'odd' has dtype torch.float8\S+, .* set EMAConfig.dtype to float32"
    ):
        ExponentialMovingAverage(model, EMAConfig(dtype=None))
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5, check_finite=True))
    average.update(model, iteration=0)
    model.odd.data = torch.tensor([2.0, 4.0]).to(dtype)
    average.update(model, iteration=1)
    assert average.state_dict()["odd"].tolist() == [1.5, 3.0]
    with average.swapped_into(model):
        assert model.odd.float().tolist() == [1.5, 3.0]
    assert model.odd.float().tolist() == [2, 4]


def test_what_is_excluded_may_be_of_any_kind() -> None:
    model = with_parameter(torch.eye(3).to_sparse())
    average = ExponentialMovingAverage(model, EMAConfig(exclude=["odd"]))
    average.update(model, iteration=0)
    with average.swapped_into(model):
        pass
    average.update(model, iteration=1)


def test_a_sparse_buffer_is_copied_where_the_model_is_and_refused_on_the_host() -> None:
    model = with_buffer(torch.eye(3).to_sparse())
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    model.odd = torch.eye(4).to_sparse()
    average.update(model, iteration=1)
    with average.swapped_into(model):
        assert torch.equal(model.odd.to_dense(), torch.eye(4))
    with pytest.raises(ValueError, match="'odd' has layout"):
        ExponentialMovingAverage(model, EMAConfig(device="cpu"))


def test_a_buffer_that_gets_such_a_kind_later_is_refused_and_the_average_goes_on() -> None:
    model = with_buffer(torch.ones(3))
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    model.odd = nested()
    with pytest.raises(ValueError, match="'odd' is a nested tensor"):
        average.update(model, iteration=1)
    model.odd = torch.ones(2)
    average.update(model, iteration=1)
    assert average.state_dict()["odd"].tolist() == [1, 1]


def test_a_weight_that_consists_of_other_tensors_is_refused_for_a_swap_could_not_put_it_back() -> None:
    model = nn.Linear(20, 20, bias=False)
    model.pair = nn.Parameter(TwoTensor(torch.zeros(20, 20), torch.ones(20, 20)))
    with pytest.raises(ValueError, match="'pair' is a TwoTensor"):
        ExponentialMovingAverage(model, EMAConfig(decay=0.5))


@pytest.mark.parametrize("first", [torch.zeros(1), None])
def test_a_buffer_that_becomes_a_parameter_is_refused(first: Tensor | None) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("position", first)
    average = averaged(model)
    del model.position
    model.position = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="'position' was a buffer"):
        average.update(model, iteration=1)


def to_integers(model: nn.Module) -> None:
    model.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)


def to_integers_in_place(model: nn.Module) -> None:
    model.weight.requires_grad_(False)
    model.weight.data = torch.ones(2, 2, dtype=torch.int8)


def to_complex(model: nn.Module) -> None:
    model.weight.data = torch.ones(2, 2, dtype=torch.complex64)


def to_lazy(model: nn.Module) -> None:
    model.weight = nn.UninitializedParameter()


def to_sparse(model: nn.Module) -> None:
    model.weight = nn.Parameter(torch.ones(2, 2).to_sparse())


@pytest.mark.parametrize("check_finite", [False, True])
@pytest.mark.parametrize("change", [to_integers, to_integers_in_place, to_complex, to_lazy, to_sparse])
def test_a_weight_of_another_kind_is_refused_by_name_and_the_average_is_as_before(
    change: object, check_finite: bool
) -> None:
    model = nn.Linear(2, 2)
    average = averaged(model, EMAConfig(decay=0.5, check_finite=check_finite))
    before = average.state_dict(snapshot=True)
    change(model)  # type: ignore[operator]
    with pytest.raises(ValueError, match="'weight'"):
        average.update(model, iteration=1)
    with pytest.raises(ValueError, match="'weight'"), average.swapped_into(model):
        pass
    after = average.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_weight_whose_elements_share_memory_now_is_not_swapped() -> None:
    model = nn.Linear(2, 2)
    average = averaged(model)
    model.weight.data = torch.ones(1, 2).expand(2, 2)
    average.update(model, iteration=1)
    with pytest.raises(ValueError, match="'weight' is an expanded tensor"), average.swapped_into(model):
        pass


def test_a_model_may_change_its_precision_and_lose_frozen_integers() -> None:
    model = nn.Linear(2, 2)
    model.codes = nn.Parameter(torch.ones(2, dtype=torch.uint8), requires_grad=False)
    average = averaged(model, EMAConfig(decay=0.5, dtype=None))
    del model.codes
    model.to(torch.float8_e4m3fn)
    average.update(model, iteration=1)
    assert average.state_dict()["weight"].dtype == torch.float32


def test_integers_that_become_floating_point_are_refused() -> None:
    model = nn.Linear(2, 2)
    model.scale = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    tracked, published = averaged(model, EMAConfig(track_frozen=True)), averaged(model)
    model.scale = nn.Parameter(torch.tensor([0.5, 300.7]))
    for average in (tracked, published):
        with pytest.raises(ValueError, match="'scale'"):
            average.update(model, iteration=1)
