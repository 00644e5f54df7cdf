"""A training that was saved and resumed goes on bit for bit like one that was not: the reference is that one."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from ema import EMAConfig, ExponentialMovingAverage
from tests.makers import save_checkpoint
from trainer.checkpoint.store import stored_tensors
from trainer.checkpoint.training_state import load_training_state, training_state
from trainer.config.schema import OptimizerConfig
from trainer.errors import ConfigError
from trainer.optimizers import make_optimizer

Factory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Net(nn.Module):
    """Tied weights, BatchNorm buffers, a scalar parameter, one that gets no gradient and one that is frozen."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Linear(6, 6, bias=False)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.inner.weight
        self.norm = nn.BatchNorm1d(6)
        self.module = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.norm(self.tied(self.inner(x).tanh())) + self.module(x) + self.frozen


OPTIMIZERS: dict[str, Factory] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adam_amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, dampening=0.5),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "groups": lambda p: torch.optim.AdamW(
        [{"params": p[1:]}, {"params": p[:1], "weight_decay": 0.0}], lr=0.01
    ),
}


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> nn.Module:
    for step in range(first, last):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        optimizer.step()
    return model


def assert_equal_training(left: tuple[nn.Module, Any], right: tuple[nn.Module, Any]) -> None:
    ours, theirs = left[0].state_dict(), right[0].state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = left[1].state_dict()["state"], right[1].state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for number, entry in theirs.items():
        assert ours[number].keys() == entry.keys()
        for name, value in entry.items():
            same = (
                torch.equal(ours[number][name], value)
                if isinstance(value, Tensor)
                else ours[number][name] == value
            )
            assert same, (number, name)


@pytest.mark.parametrize("gradients_set", [False, True])
@pytest.mark.parametrize("saved_at", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_equals_uninterrupted(tmp_path: Path, name: str, saved_at: int, gradients_set: bool) -> None:
    model = Net()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    trained(model, optimizer, 0, saved_at)
    path = save_checkpoint(tmp_path, saved_at, training_state(model, optimizer), keep=1)
    trained(model, optimizer, saved_at, 6)

    resumed = Net(seed=1)
    its_optimizer = OPTIMIZERS[name](list(resumed.parameters()))
    if gradients_set:
        resumed(torch.randn(8, 6)).sum().backward()
    load_training_state(path, resumed, its_optimizer)
    trained(resumed, its_optimizer, saved_at, 6)
    assert_equal_training((resumed, its_optimizer), (model, optimizer))
    assert resumed.tied.weight is resumed.inner.weight


def test_taking_the_state_changes_nothing(tmp_path: Path) -> None:
    model = Net()
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    before = copy.deepcopy(model.state_dict())
    training_state(model, optimizer)
    assert not optimizer.state
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_optimizer_that_went_further_is_set_back(tmp_path: Path) -> None:
    model = Net()
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    path = save_checkpoint(tmp_path, 0, training_state(model, optimizer), keep=1)
    start = copy.deepcopy(model.state_dict())
    trained(model, optimizer, 0, 2)
    load_training_state(path, model, optimizer)
    assert not optimizer.state
    assert all(torch.equal(value, start[key]) for key, value in model.state_dict().items())


def wrapped(model: Net, how: str) -> nn.Module:
    if how == "checkpointed":
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, nn.Linear))
    return torch.compile(model, backend="eager") if how == "compiled" else model


@pytest.mark.parametrize("saved_as", ["bare", "checkpointed", "compiled"])
@pytest.mark.parametrize("loaded_as", ["bare", "checkpointed", "compiled"])
def test_wrappers_do_not_show_in_the_names(tmp_path: Path, saved_as: str, loaded_as: str) -> None:
    model = wrapped(Net(), saved_as)
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    trained(model, optimizer, 0, 2)
    path = save_checkpoint(tmp_path, 2, training_state(model, optimizer), keep=1)
    names = {key.removeprefix("model/") for key in stored_tensors(path) if key.startswith("model/")}
    assert names == Net().state_dict().keys()
    assert "optimizer/state/module.weight/exp_avg" in stored_tensors(path)

    resumed = wrapped(Net(seed=1), loaded_as)
    its_optimizer = OPTIMIZERS["adamw"](list(resumed.parameters()))
    load_training_state(path, resumed, its_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), model.parameters(), strict=True))
    assert_equal_training((Net(), its_optimizer), (Net(), optimizer))


def test_group_settings_are_the_configs_not_the_checkpoints(tmp_path: Path) -> None:
    model = Net()
    path = save_checkpoint(
        tmp_path, 0, training_state(model, torch.optim.AdamW(model.parameters(), lr=1.0)), keep=1
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.2)
    load_training_state(path, model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5 and optimizer.param_groups[0]["weight_decay"] == 0.2


class Counting(torch.optim.Optimizer):
    """Divides the learning rate by a count of its steps, kept in the groups or in the state of no parameter."""

    def __init__(self, params: Any, lr: float, shared: bool, tensor: bool) -> None:
        super().__init__(params, {"lr": lr, "k": torch.zeros(()) if tensor else 0})
        self.shared, self.tensor = shared, tensor

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        kept: Any = self.state if self.shared else self.param_groups[0]
        kept["k"] = kept.get("k", torch.zeros(()) if self.tensor else 0) + 1
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.sub_(group["lr"] / kept["k"] * weight.grad)


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_an_optimizer_resumes_with_the_state_that_belongs_to_no_parameter(
    shared: bool, tensor: bool, tmp_path: Path
) -> None:
    def made(model: nn.Module) -> torch.optim.Optimizer:
        config = OptimizerConfig(
            _target_=f"{__name__}.Counting", lr=0.1, args={"shared": shared, "tensor": tensor}
        )
        return make_optimizer(model, config, [__name__])

    whole, stopped, resumed = Net(), Net(), Net(seed=1)
    trained(whole, made(whole), 0, 4)
    optimizer = made(stopped)
    trained(stopped, optimizer, 0, 2)
    path = save_checkpoint(tmp_path, 2, training_state(stopped, optimizer), keep=1)
    optimizer = made(resumed)
    load_training_state(path, resumed, optimizer)
    trained(resumed, optimizer, 2, 4)
    pairs = zip(resumed.parameters(), whole.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_other_state_comes_with_it(tmp_path: Path) -> None:
    model = Net()
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    others = {"ema": {"x": torch.ones(3), "updates": 4}, "step": 2}
    path = save_checkpoint(tmp_path, 2, {**training_state(model, optimizer), **others}, keep=1)
    x = torch.zeros(3)
    loaded = load_training_state(path, model, optimizer, {"ema": {"x": x}})
    assert loaded["ema"] == {"x": x, "updates": 4} and loaded["step"] == 2 and torch.equal(x, torch.ones(3))


def test_another_optimizer_is_refused_by_name(tmp_path: Path) -> None:
    model = Net()
    path = save_checkpoint(tmp_path, 1, training_state(model, torch.optim.AdamW(model.parameters())), keep=1)
    with pytest.raises(ConfigError, match=r"^optimizer: .* was saved with AdamW; got SGD$"):
        load_training_state(path, model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    small, large = nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
    for model in (small, large):
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        save_checkpoint(tmp_path / str(model.bias is None), 1, training_state(model, optimizer), keep=1)
    with pytest.raises(ConfigError, match="has no tensor model/bias"):
        load_training_state(tmp_path / "True" / "step-00000001", large, torch.optim.AdamW(large.parameters()))
    with pytest.raises(ConfigError, match="has model/bias, and the model has no such tensor"):
        load_training_state(
            tmp_path / "False" / "step-00000001", small, torch.optim.AdamW(small.parameters())
        )


def test_optimizer_of_other_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="a parameter that the model does not have"):
        training_state(Net(), torch.optim.SGD(Net().parameters(), lr=0.1))


def test_weights_that_are_an_average_are_not_saved_as_the_live_ones() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    with (
        average.swapped_into(model),
        pytest.raises(RuntimeError, match="while an average is swapped into it"),
    ):
        training_state(model, optimizer)
    training_state(model, optimizer)
