"""What a model may change under its average, what is refused by name, and what only some calls used to get right."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from ema import EMABank, EMAConfig, ExponentialMovingAverage, divergence
from tests.makers import shake

HALF = EMAConfig(decay=0.5)


def averaged(model: nn.Module, config: EMAConfig = HALF) -> ExponentialMovingAverage:
    """An average of a model that has absorbed its weights at iteration 0."""
    average = ExponentialMovingAverage(model, config)
    average.update(model, iteration=0)
    return average


def test_a_weight_that_consists_of_other_tensors_is_refused_for_a_swap_could_not_put_it_back() -> None:
    model = nn.Linear(20, 20, bias=False)
    model.pair = nn.Parameter(TwoTensor(torch.zeros(20, 20), torch.ones(20, 20)))
    with pytest.raises(ValueError, match="'pair' is a TwoTensor"):
        ExponentialMovingAverage(model, HALF)


def test_a_buffer_that_consists_of_other_tensors_comes_back_from_a_swap() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("pair", TwoTensor(torch.zeros(20, 20), torch.ones(20, 20)))
    average = averaged(model)
    model.pair = TwoTensor(torch.full((20, 20), 8.0), torch.full((20, 20), 9.0))
    with average.swapped_into(model):
        assert (model.pair.a[0, 0], model.pair.b[0, 0]) == (0, 1)
    assert (model.pair.a[0, 0], model.pair.b[0, 0]) == (8, 9)


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


def test_a_combination_without_live_weights_is_finite_though_they_are_not() -> None:
    model = nn.Linear(2, 2)
    bank = EMABank(model, {"a": HALF, "b": EMAConfig(decay=0.9)})
    bank.update(model, iteration=0)
    first = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    bank.update(model, iteration=1, finite=False)
    assert torch.equal(bank.combined(model, {"a": 0.5, "b": 0.5})["weight"], first)
    assert bank.combined(model, {"a": 0.5}, live=0.5)["weight"].isnan().all()


def test_the_check_for_finite_weights_looks_at_what_is_averaged() -> None:
    model = nn.Linear(2, 2)
    model.mask = nn.Parameter(torch.full((2, 2), -torch.inf).triu(1), requires_grad=False)
    model.register_buffer("scale", torch.ones(1))
    average = averaged(model, EMAConfig(decay=0.5, check_finite=True, average_buffers=["scale"]))
    assert (average.num_updates, average.num_skipped) == (1, 0)
    model.scale.fill_(torch.inf)
    average.update(model, iteration=1)
    assert (average.num_updates, average.num_skipped) == (1, 1)
    assert average.state_dict()["scale"] == 1


class Returning(nn.Module):
    """A model that returns a parameter and a view of it beside its result."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return inputs * self.weight, {"whole": self.weight, "part": self.weight[:1]}


def test_what_a_teacher_returns_of_its_parameters_is_the_average_and_stays_so() -> None:
    model = Returning()
    average = averaged(model)
    with torch.no_grad():
        model.weight.add_(8)
    average.update(model, iteration=1)
    product, returned = average.forward(model, torch.ones(2))
    assert product.tolist() == returned["whole"].tolist() == [4, 4] and not returned["whole"].requires_grad
    returned["part"].zero_()
    average.update(model, iteration=2)
    assert average.state_dict()["weight"].tolist() == [6, 6] and returned["whole"].tolist() == [4, 4]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_scripted_model_teaches_and_keeps_its_buffers() -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    scripted = torch.jit.script(copy.deepcopy(plain))
    inputs = torch.randn(4, 2)
    found = []
    for model in (plain, scripted):
        torch.manual_seed(0)
        average = averaged(model)
        model(torch.randn(4, 2) + 5)
        shake(model)
        average.update(model, iteration=1)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        found.append(average.forward(model, inputs))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(found[0], found[1])


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


class Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def test_two_values_of_one_tied_tensor_are_refused() -> None:
    average = ExponentialMovingAverage(Tied(True), HALF)
    untied = averaged(Tied(False)).state_dict()
    with pytest.raises(KeyError, match=r"embedding.weight.* and .*head.weight"):
        average.load_state_dict(untied)
    average.load_state_dict({**untied, "head.weight": untied["embedding.weight"].clone()})
    parameters = {name: nn.Parameter(value) for name, value in untied.items() if not name.startswith("_ema")}
    with pytest.raises(KeyError, match="are tied"):
        average.load_state_dict(parameters)


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


def test_averages_of_two_models_are_not_measured_together() -> None:
    one, other = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(KeyError, match=r"the model lacks '0\.weight'"):
        divergence({"one": averaged(one), "other": averaged(other)}, one)


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


class Caching(nn.Linear):
    """A layer that keeps a table with the size that it is for, what it computed, and how often."""

    size, table, feature, calls = 0, None, None, 0

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) != self.size:
            self.size, self.table = len(inputs), torch.arange(1.0, len(inputs) + 1).unsqueeze(1)
        self.feature = self.weight * 2
        self.calls += 1
        return inputs @ self.weight.T * self.table


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_teacher_leaves_what_belongs_to_a_graph_of_the_live_model() -> None:
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(2, 2)), Caching(2, 2))
    average = averaged(model)
    with torch.no_grad():
        shake(model)
    average.update(model, iteration=1)
    model(torch.ones(1, 2))
    norm, feature = model[0].weight, model[1].feature
    average.forward(model, torch.ones(1, 2))
    assert model[0].weight is norm and norm.requires_grad and model[1].feature is feature


def test_a_teacher_leaves_a_cache_and_its_size_together() -> None:
    model = Caching(2, 2)
    average = averaged(model)
    expected = copy.deepcopy(model)(torch.ones(3, 2))
    model(torch.ones(1, 2))
    average.forward(model, torch.ones(3, 2))
    assert torch.equal(model(torch.ones(3, 2)), expected) and model.calls == 3


def test_a_teacher_returns_the_very_object_of_the_model() -> None:
    class Filling(nn.Linear):
        def forward(self, inputs: Tensor, into: dict[str, Tensor]) -> dict[str, Tensor]:
            into["out"] = super().forward(inputs)
            return into

    model, into = Filling(2, 2), {}
    assert averaged(model).forward(model, torch.ones(1, 2), into) is into
