"""Whatever happens to the model inside a swap: the live weights come back bit for bit, and the run goes on."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm, weight_norm

from ema import EMAConfig, ExponentialMovingAverage, is_swapped
from tests.makers import assert_same


class Adapted(nn.Module):
    """A frozen weight with a trained low-rank addition, merged in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3), requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(3, 1)), nn.Parameter(torch.randn(1, 3))
        self.merged = False

    def train(self, mode: bool = True) -> "Adapted":
        super().train(mode)
        if mode is self.merged:
            self.weight.data += (self.a @ self.b).detach() * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight if self.merged else self.weight + self.a @ self.b)


class Table(nn.Module):
    """A buffer that grows to the longest input, with its length beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(2.0), persistent=False)
        self.length = 2

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.length:
            self.length = len(x)
            self.register_buffer("table", torch.arange(float(self.length)), persistent=False)
        return x + self.table[: len(x), None]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.adapted, self.norm = Table(), Adapted(), nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.adapted(self.table(x))))


def a_replaced_parameter(model: Net) -> None:
    model.head.weight = nn.Parameter(torch.zeros(3, 3))


def a_load_with_assign(model: Net) -> None:
    model.load_state_dict({n: torch.zeros_like(v) for n, v in model.state_dict().items()}, assign=True)


def merging_by_eval(model: Net) -> None:
    model.eval()


def merging_and_unmerging(model: Net) -> None:
    model.eval().train()


def a_longer_input(model: Net) -> None:
    model(torch.randn(5, 3))


def another_dtype(model: Net) -> None:
    model.half()


def another_dtype_with_new_objects(model: Net) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def another_dtype_with_swapped_tensors(model: Net) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.bfloat16()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def another_device(model: Net) -> None:
    model.to_empty(device="meta")


def another_storage(model: Net) -> None:
    model.head.weight.data = torch.zeros(2, 2)
    model.norm.running_mean.set_(torch.zeros(7))


def an_empty_storage(model: Net) -> None:
    model.head.weight.untyped_storage().resize_(0)


def tying(model: Net) -> None:
    model.head.weight.data = model.adapted.weight.data


def removing(model: Net) -> None:
    del model.head.bias
    del model.norm.running_var
    del model.table


def adding(model: Net) -> None:
    model.extra = nn.Linear(2, 2)
    model.head.register_parameter("scale", nn.Parameter(torch.ones(3)))
    model.register_buffer("late", torch.ones(2))


def another_module(model: Net) -> None:
    model.head = nn.Identity()


def a_parametrization(model: Net) -> None:
    parametrizations.weight_norm(model.head)


def fusing(model: Net) -> None:
    model.eval()
    model.head.weight.data.mul_(2)
    model.norm = nn.Identity()


def writing_under_inference_mode(model: Net) -> None:
    with torch.inference_mode():
        model.norm.running_mean = model.norm.running_mean * 2
        model.head.weight.mul_(2)


def zeroing_non_persistent_buffers(model: Net) -> None:
    model.table.table.zero_()


def pruning(model: Net) -> None:
    prune.l1_unstructured(model.head, "weight", 0.5)


def freezing(model: Net) -> None:
    model.requires_grad_(False)


def quantizing(model: Net) -> None:
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


INSIDE = [
    pruning,
    freezing,
    quantizing,
    a_replaced_parameter,
    a_load_with_assign,
    merging_by_eval,
    merging_and_unmerging,
    a_longer_input,
    another_dtype,
    another_dtype_with_new_objects,
    another_dtype_with_swapped_tensors,
    another_device,
    another_storage,
    an_empty_storage,
    tying,
    removing,
    adding,
    another_module,
    a_parametrization,
    fusing,
    writing_under_inference_mode,
    zeroing_non_persistent_buffers,
]


def everything(model: nn.Module) -> dict[str, Tensor]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()(torch.ones(4, 3) + torch.eye(4, 3)).square().sum().backward()
    optimizer.step()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
@pytest.mark.parametrize("inside", INSIDE)
def test_the_model_is_as_before_and_training_goes_on(inside: Callable[[Net], None], fails: bool) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5))
    for iteration in range(2):
        step(model, optimizer)
        average.update(model, iteration=iteration)
    before, objects = everything(model), [*model.parameters(), *model.buffers()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    modules, shadow = dict(model.named_modules()), average.state_dict(snapshot=True)
    try:
        with average.swapped_into(model):
            assert not torch.equal(model.head.bias, before["head.bias"])
            inside(model)
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert not is_swapped(model)
    model.train()
    assert_same(everything(model), before)
    assert dict(model.named_modules()) == modules
    assert all(
        now is then for now, then in zip([*model.parameters(), *model.buffers()], objects, strict=True)
    )
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert_same(average.state_dict(), shadow)
    model.eval()
    model.train()
    model(torch.randn(5, 3))
    step(model, optimizer)
    average.update(model, iteration=2)


def test_a_counter_of_a_module_whose_tensors_are_the_same_goes_on() -> None:
    class Counted(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    model = Counted(2, 2)
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    with average.swapped_into(model):
        model(torch.ones(1, 2))
    assert model.calls == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (parametrizations.weight_norm, lambda model: parametrize.remove_parametrizations(model, "weight")),
        (weight_norm, remove_weight_norm),
        (lambda model: prune.random_unstructured(model, "weight", 0.5), lambda m: prune.remove(m, "weight")),
    ],
    ids=["parametrization", "weight_norm", "pruning"],
)
def test_a_merged_reparametrization_is_undone(
    wrap: Callable[[nn.Module], nn.Module], unwrap: Callable[[nn.Module], object]
) -> None:
    model = wrap(nn.Linear(3, 3))
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5))
    average.update(model, iteration=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    x = torch.ones(2, 3)
    live, before = model(x).detach(), everything(model)
    with average.swapped_into(model):
        unwrap(model)
        assert not torch.equal(model(x), live)
    assert_same(everything(model), before)
    assert torch.equal(model(x), live)
    average.update(model, iteration=1)


class Expanded(nn.Linear):
    """A buffer whose elements are one in memory."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_buffer("positions", torch.arange(3).expand(4, -1))
        self.register_buffer("windows", torch.arange(5.0).unfold(0, 3, 1))


def test_buffers_that_cannot_be_written_in_place_are_swapped_and_copied() -> None:
    model, target = Expanded(), Expanded()
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    positions = model.positions
    model.windows = torch.ones(3, 3)
    with average.swapped_into(model):
        assert torch.equal(model.windows, torch.arange(5.0).unfold(0, 3, 1))
    assert model.positions is positions and torch.equal(model.windows, torch.ones(3, 3))
    target.positions = torch.zeros(1, 3).expand(4, -1)
    average.copy_to(target)
    assert torch.equal(target.positions, positions)
    average.update(model, iteration=1)


def test_inference_tensors_are_swapped_updated_and_copied() -> None:
    with torch.inference_mode():
        model, target = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
        average = ExponentialMovingAverage(model, EMAConfig(decay=0.5))
        average.update(model, iteration=0)
        model.weight.fill_(3)
    average.update(model, iteration=1)
    average.update(model, iteration=2)
    with average.swapped_into(model):
        assert model.weight.tolist() == [2.5, 2.5]
    assert model.weight.tolist() == [3, 3]
    average.copy_to(target)
    assert target.weight.tolist() == [2.5, 2.5]
    average.load_state_dict(average.state_dict(snapshot=True))
    average.update(model, iteration=3)


def test_an_average_that_was_made_and_loaded_in_inference_mode_goes_on_outside() -> None:
    model = nn.BatchNorm1d(2)
    with torch.inference_mode():
        average = ExponentialMovingAverage(model, EMAConfig(decay=0.5))
        average.load_state_dict(average.state_dict(snapshot=True))
    average.update(model, iteration=0)
    average.update(model, iteration=1)
    with torch.inference_mode(), average.swapped_into(model):
        pass
    model(torch.randn(3, 2)).sum().backward()
    with average.swapped_into(model):
        pass
    average.update(model, iteration=2)


def test_a_swap_that_fails_at_the_start_restores_and_unmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    before, real = everything(model), torch._foreach_copy_

    def failing(targets: list[Tensor], sources: list[Tensor]) -> None:
        patch.undo()
        real(targets[:3], sources[:3])
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", failing)
        with pytest.raises(MemoryError), average.swapped_into(model):
            pass
    assert_same(everything(model), before)
    assert not is_swapped(model)
    average.update(model, iteration=1)


class Registry(dict[str, object]):
    """A dict whose methods do something else than those of a dict."""

    def copy(self) -> "Registry":
        return self

    def clear(self) -> None:
        raise TypeError("a registry is never emptied")


def test_a_dict_with_methods_of_its_own_goes_back_with_the_tensors_of_its_module() -> None:
    model = Net()
    model.adapted.registry = Registry(a=1)  # type: ignore[assignment]
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    with average.swapped_into(model):
        model.adapted.registry["b"] = 2  # type: ignore[index]
        with torch.no_grad():
            model.adapted.a.add_(1)
    assert model.adapted.registry == {"a": 1}


def test_what_cannot_be_restored_is_named_and_the_rest_is_restored() -> None:
    model = Net()
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    with torch.no_grad():
        model.head.bias.add_(1)
        model.adapted.a.add_(1)
    before = everything(model)

    class Locked(nn.Parameter):
        @property
        def data(self) -> Tensor:
            return self.detach()

        @data.setter
        def data(self, value: Tensor) -> None:
            raise RuntimeError("locked")

    model.adapted.b = Locked(model.adapted.b.detach().clone())
    average.update(model, iteration=1)
    with (
        pytest.raises(RuntimeError, match=r"'adapted.b' of the live model could not be restored .* locked"),
        average.swapped_into(model),
    ):
        nn.Parameter.data.__set__(model.adapted.b, torch.zeros(9))  # type: ignore[attr-defined]
    now = everything(model)
    assert all(torch.equal(now[name], value) for name, value in before.items() if name != "adapted.b")
    assert not is_swapped(model)
