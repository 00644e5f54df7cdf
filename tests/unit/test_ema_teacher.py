"""A forward with the weights of an average, inside a training step: against a second model that holds them."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from ema import EMABank, EMAConfig, ExponentialMovingAverage, is_swapped
from tests.makers import assert_same, averaged, shake


class Net(nn.Module):
    """A network with BatchNorm, dropout, tied weights, a recurrent layer, and buffers that a forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(3, 6)
        self.norm = nn.BatchNorm1d(6)
        self.rnn = nn.GRU(6, 6, batch_first=True)
        self.drop = nn.Dropout(0.3)
        self.tied = nn.Linear(6, 6, bias=False)
        self.out = nn.Linear(6, 6)
        self.out.weight = self.tied.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", None)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.inside: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.scratch += 1
        self.inside = [*self.parameters()], [parameter.data_ptr() for parameter in self.parameters()]
        x = self.norm(self.into(x)).tanh()
        x = self.rnn(x[None])[0][0]
        self.last = x.detach().mean(0)
        return self.out(self.drop(self.tied(x)))


def trained(live: torch.dtype = torch.float32, **config: Any) -> tuple[Net, ExponentialMovingAverage]:
    torch.manual_seed(0)
    model = Net().to(live)
    average = ExponentialMovingAverage(model, EMAConfig(**{"decay": 0.7} | config))
    for step in range(3):
        shake(model, 0.1)
        model(torch.randn(8, 3, dtype=live))
        average.update(model, iteration=step)
    shake(model, 0.1)
    model(torch.randn(8, 3, dtype=live))
    return model, average


def everything(model: nn.Module) -> dict[str, Any]:
    state = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    buffers = dict(model.named_buffers())
    state |= {name: buffer.clone() for name, buffer in buffers.items()}
    objects = {f"id {name}": id(tensor) for name, tensor in (*model.named_parameters(), *buffers.items())}
    memory = {f"at {name}": parameter.data_ptr() for name, parameter in model.named_parameters()}
    modes = {f"mode {path}": module.training for path, module in model.named_modules()}
    return state | objects | memory | modes


CONFIGS = [
    pytest.param(torch.float32, {}, id="float32"),
    pytest.param(torch.bfloat16, {}, id="bfloat16 weights, float32 shadow"),
    pytest.param(torch.float32, {"device": "cpu", "dtype": "float64"}, id="offloaded, float64 shadow"),
    pytest.param(torch.float32, {"exclude": ["rnn.*"], "average_buffers": ["norm.running_*"]}, id="patterns"),
]


@pytest.mark.parametrize(("dtype", "config"), CONFIGS)
@pytest.mark.parametrize("train", [False, True])
def test_it_equals_a_second_model_and_changes_nothing(
    dtype: torch.dtype, config: dict[str, Any], train: bool
) -> None:
    model, average = trained(dtype, **config)
    model.norm.eval()
    second = copy.deepcopy(model)
    average.copy_to(second)
    x = torch.randn(8, 3, dtype=dtype)
    before, shadow = everything(model), average.state_dict(snapshot=True)
    torch.manual_seed(1)
    found = average.forward(model, x, train=train)
    assert_same(everything(model), before)
    assert_same(average.state_dict(), shadow)
    torch.manual_seed(1)
    with torch.no_grad():
        # To rounding: on some processors a product depends on how the weights are aligned in memory.
        torch.testing.assert_close(found, second.train(train)(x))
        assert not torch.allclose(found, model.train(train)(x), rtol=0.1)
    assert not found.requires_grad


def test_the_gradients_of_the_student_are_those_without_a_teacher() -> None:
    model, average = trained()
    x = torch.randn(8, 3)
    seen = []
    for teaches in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        student = model.train()(x)
        if teaches:
            average.forward(model, x, train=True)
        student.square().sum().backward()
        seen.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert_same(seen[1], seen[0])


def test_the_model_computes_with_the_memory_of_the_shadow() -> None:
    """Also the weights that a module keeps in a list of its own, as a recurrent layer does."""
    model, average = trained()
    average.forward(model, torch.randn(8, 3))
    shadows = {tensor.data_ptr() for tensor in average.state_dict().values()}
    parameters, addresses = model.inside
    assert all(now is then for now, then in zip(parameters, model.parameters(), strict=True))
    assert set(addresses) <= shadows


def test_evaluation_mode_takes_no_random_numbers_and_train_mode_does() -> None:
    model, average = trained()
    state = torch.get_rng_state()
    average.forward(model, torch.zeros(8, 3))
    assert torch.equal(torch.get_rng_state(), state)
    average.forward(model, torch.zeros(8, 3), train=True)
    assert not torch.equal(torch.get_rng_state(), state)


def test_a_forward_that_fails_leaves_everything_as_it_was() -> None:
    model, average = trained()
    before, shadow = everything(model), average.state_dict(snapshot=True)
    for x in (torch.zeros(8, 4), None):
        with pytest.raises((RuntimeError, TypeError)):
            average.forward(model, x, train=True)
        assert_same(everything(model), before)
        assert_same(average.state_dict(), shadow)
        assert not is_swapped(model)


def test_autocast_caches_no_weights_of_the_other_model() -> None:
    model, average = trained()
    second = copy.deepcopy(model)
    average.copy_to(second)
    x = torch.randn(8, 3)
    with torch.autocast("cpu", torch.bfloat16):
        first = model.eval().tied(x.repeat(1, 2))
        found = average.forward(model, x)
        again = model.tied(x.repeat(1, 2))
        with torch.no_grad():
            assert torch.equal(found, second.eval()(x))
    assert torch.equal(first, again) and again.requires_grad


def test_a_compiled_model_teaches_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    compiled = torch.compile(model, backend="aot_eager")
    average = ExponentialMovingAverage(compiled, EMAConfig(decay=0.5))
    second = copy.deepcopy(model)
    average.update(compiled, iteration=0)
    for step in range(1, 4):
        x = torch.randn(8, 3)
        student = compiled(x)
        found = {train: average.forward(compiled, x, train=train) for train in (False, True)}
        average.copy_to(second)
        for train, answer in found.items():
            with torch.no_grad():
                torch.testing.assert_close(answer, second.train(train)(x))  # to rounding, as above
        model.zero_grad()
        student.square().sum().backward()
        shake(model)
        average.update(compiled, iteration=step)


def test_several_averages_teach_and_one_that_is_swapped_in_does_not() -> None:
    model, _ = trained()
    bank = EMABank(model, {"a": EMAConfig(decay=0.5), "b": EMAConfig(decay=0.9)})
    for step in range(2):
        bank.update(model, iteration=step)
        shake(model)
    x = torch.randn(8, 3)
    first, other = (average.forward(model, x) for average in bank.values())
    assert not torch.equal(first, other)
    with bank["a"].swapped_into(model):
        for average in bank.values():
            with pytest.raises(RuntimeError, match="run an average while an average is swapped"):
                average.forward(model, x)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), first)


def test_the_average_counts_as_swapped_in_during_the_call() -> None:
    model, average = trained()
    seen: list[bool] = []

    def hook(*_: object) -> None:
        seen.append(is_swapped(model))
        with pytest.raises(RuntimeError, match="update an average while"):
            average.update(model, iteration=9)

    handle = model.register_forward_pre_hook(hook)
    average.forward(model, torch.zeros(8, 3))
    handle.remove()
    assert seen == [True] and not is_swapped(model)


class Renormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.weight.mul_(0.5)
        return x @ self.weight


def test_a_forward_that_writes_into_its_parameters_is_refused() -> None:
    model = Renormed()
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    average.forward(model, torch.ones(1, 3))
    with pytest.raises(RuntimeError, match=r"'weight'.*only reads"):
        average.forward(model, torch.ones(1, 3), train=True)
    assert torch.equal(model.weight, torch.ones(3, 3))


def test_before_the_start_the_live_weights_teach_and_a_late_start_gives_a_warning() -> None:
    model = Net()
    average = ExponentialMovingAverage(model, EMAConfig(start_iter=5))
    x = torch.randn(8, 3)
    with torch.no_grad():
        live = copy.deepcopy(model).eval()(x)
    assert torch.equal(average.forward(model, x), live)
    average.update(model, iteration=0)
    with pytest.warns(UserWarning, match=r"forward: the average has not started \(start_iter=5\)"):
        assert torch.equal(average.forward(model, x), live)


def test_a_model_that_does_not_fit_is_refused() -> None:
    _, average = trained()
    with pytest.raises(KeyError, match="lacks"):
        average.forward(nn.Linear(3, 3), torch.zeros(8, 3))


class Merging(nn.Linear):
    """A layer that merges an adapter into its weight when it leaves the train mode, as loralib does."""

    def train(self, mode: bool = True) -> "Merging":
        if not mode and self.training:
            self.weight.data += 1
        return super().train(mode)


def test_a_layer_that_merges_weights_in_eval_mode_keeps_the_live_ones() -> None:
    model = nn.Sequential(Merging(3, 2))
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5))
    average.update(model, iteration=0)
    before = model[0].weight.detach().clone()
    average.forward(model, torch.randn(4, 3))
    assert torch.equal(model[0].weight, before) and model[0].training


def test_a_swap_between_a_forward_and_its_backward_leaves_the_gradients() -> None:
    """The weights come back bit for bit, so what autograd has saved of them is still right."""
    model, average = trained()
    x = torch.randn(8, 3)
    wanted = torch.autograd.grad(model.eval()(x).square().sum(), [*model.parameters()])
    student = model(x)
    with average.swapped_into(model):
        inside = model(x)
        with pytest.raises(RuntimeError, match="inplace operation"):
            torch.autograd.grad(student.sum(), [*model.parameters()], retain_graph=True)
    average.update(model, iteration=average.last_iteration + 1)
    with average.swapped_into(model), pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(inside.sum(), [*model.parameters()], retain_graph=True)
    found = torch.autograd.grad(student.square().sum(), [*model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="inplace operation"):
            torch.autograd.grad(inside.sum(), [*model.parameters()], retain_graph=True)
        shake(model)


def test_weights_that_parametrize_keeps_are_those_of_one_side() -> None:
    """Within `parametrize.cached()` torch computes a weight once; live model and average have one each."""
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5))
    average.update(model, iteration=0)
    shake(model)
    average.update(model, iteration=1)
    x = torch.randn(2, 4)
    live, other = model(x), average.forward(model, x)
    for first in ("teacher", "student", "swap"):
        with parametrize.cached():
            if first == "student":
                model(x)
            if first == "swap":
                model(x)
                with average.swapped_into(model):
                    assert torch.equal(model(x), other)
            assert torch.equal(average.forward(model, x), other), first
            found = model(x)
        assert torch.equal(found, live), first
        model.zero_grad()
        found.sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters()), first


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
