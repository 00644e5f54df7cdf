"""Which modules are sharded, checkpointed and compiled one by one."""

import pytest
from torch import nn

from models.gpt import GPT
from trainer.config.schema import ShardingConfig
from trainer.distributed.sharding import shard_blocks
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
