"""Which modules are sharded, checkpointed and compiled one by one; and a sharding function of the user's own."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from models.gpt import GPT
from tests.makers import assert_same
from trainer.config.schema import ShardingConfig
from trainer.distributed.processes import Processes
from trainer.distributed.sharding import shard, shard_blocks
from trainer.errors import ConfigError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(2, 2)])


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(2, 2)


def test_a_model_of_ours_says_its_blocks() -> None:
    model = GPT(vocab_size=8, context=4, n_layer=3, n_head=2, n_embd=8)
    assert shard_blocks(model, ShardingConfig()) == model.shard_blocks()


def test_a_foreign_model_gives_the_outermost_members_of_its_module_lists() -> None:
    model = Stack()
    assert shard_blocks(model, ShardingConfig()) == list(model.layers)


def test_no_split_modules_of_a_foreign_model_win_and_the_config_wins_over_them() -> None:
    model = Stack()
    model._no_split_modules = ["Linear"]  # type: ignore[assignment]
    assert len(shard_blocks(model, ShardingConfig())) == 3
    assert shard_blocks(model, ShardingConfig(block_classes=["Block"])) == list(model.layers)


def test_a_class_that_the_model_lacks_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"sharding\.block_classes: Stack contains no module of class Blok"):
        shard_blocks(Stack(), ShardingConfig(block_classes=["Blok"]))


def scaled(model: nn.Module, processes: Processes, settings: ShardingConfig, by: float) -> nn.Module:
    with torch.no_grad():
        model.head.weight.mul_(by)  # type: ignore[operator, union-attr]
    return model


def returns_nothing(model: nn.Module, processes: Processes, settings: ShardingConfig) -> None:
    pass


def fails(model: nn.Module, processes: Processes, settings: ShardingConfig) -> nn.Module:
    raise AssertionError


def sharded(name: str, args: Mapping[str, object] | None = None, allowed: Sequence[str] = ("tests.",)) -> Any:
    config = ShardingConfig(_target_=f"tests.unit.test_sharding_blocks.{name}", args=dict(args or {}))
    alone = Processes(0, 1, torch.device("cpu"))
    return shard(Stack, config, alone, on_meta=False, seed=0, allowed=allowed).module


def test_a_function_of_the_users_own_shards_the_model_with_its_arguments() -> None:
    once, twice = sharded("scaled", {"by": 1}), sharded("scaled", {"by": 2})
    assert torch.equal(twice.head.weight, 2 * once.head.weight)


def test_a_function_that_is_not_allowed_or_does_not_fit_is_one_line() -> None:
    for name, args, allowed, message in (
        ("scaled", {"by": 1}, (), "sharding._target_: .* is not under trainer.distributed.strategies."),
        ("Stack", {}, ("tests.",), "sharding._target_: expected a function"),
        (
            "scaled",
            {},
            ("tests.",),
            "sharding.args: scaled must accept .*missing a required argument: 'by'",
        ),
        ("scaled", {"by": "x"}, ("tests.",), "sharding.args.by: expected float, got 'x'"),
        ("returns_nothing", {}, ("tests.",), "sharding._target_: expected the model, .* got None"),
        ("fails", {}, ("tests.",), r"sharding: AssertionError \(HYDRA_FULL_ERROR=1 shows where\)"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            sharded(name, args, allowed)
    with pytest.raises(ConfigError, match=r"^sharding\.args: none must accept"):
        config = ShardingConfig(args={"ways": 2})
        shard(Stack, config, Processes(0, 1, torch.device("cpu")), on_meta=False, seed=0)


class Remembering(nn.Module):
    """A block that computes with a buffer which its forward has just changed."""

    def __init__(self, shared: nn.BatchNorm1d) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), shared
        self.register_buffer("centre", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm(self.layer(x))
        self.centre.data.lerp_(out.detach().mean(0) + 2, 0.5)
        return (out * self.centre).tanh()


def remembering() -> nn.Sequential:
    norm = nn.BatchNorm1d(4)
    return nn.Sequential(nn.ModuleList([Remembering(norm), Remembering(norm)]))


def test_activation_checkpointing_changes_no_gradient_and_counts_statistics_once() -> None:
    found = []
    for checkpointing in (False, True):
        config = ShardingConfig(activation_checkpointing=checkpointing)
        processes = Processes(0, 1, torch.device("cpu"))
        module = shard(remembering, config, processes, on_meta=False, seed=0).module
        for _ in range(2):
            x = torch.arange(32.0).reshape(8, 4).sin()
            for block in module[0]:  # type: ignore[index, union-attr]
                x = block(x)
            loss = x.square().sum()
            loss.backward(retain_graph=True)
            loss.backward()  # repeats the forwards once more
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        found.append({**dict(module.named_buffers()), **gradients})
    assert found[0]["0.0.norm.num_batches_tracked"] == 4
    assert_same(found[1], found[0])
