"""Any sharding starts from the weights of the one-process run."""

import torch
from torch import nn

from models.dit import DiT
from models.gpt import GPT
from models.resnet import ResNet
from tests.ranks import RankPool
from trainer.config.schema import ShardingConfig
from trainer.distributed.processes import Processes
from trainer.distributed.sharding import shard

SEED = 7


def gpt() -> nn.Module:
    return GPT(vocab_size=17, context=8, n_layer=2, n_head=2, n_embd=12)  # 17 rows: uneven shards


def dit() -> nn.Module:
    return DiT(image_size=4, patch_size=2, in_channels=1, hidden=8, depth=1, heads=2, num_classes=3)


def resnet() -> nn.Module:
    return ResNet(in_channels=1, num_classes=3, widths=[4, 6], blocks_per_stage=1, image_size=8)


def sharded_weights(name: str, strategy: str, replicate: int) -> dict[str, torch.Tensor]:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config = ShardingConfig(strategy=strategy, replicate=replicate)
    torch.manual_seed(rank)  # ranks disagree until the seed of the run is set
    network = shard(
        globals()[name], config, Processes(rank, world, torch.device("cpu")), on_meta=True, seed=SEED
    )
    state = network.module.state_dict()
    return {key: t.full_tensor() if hasattr(t, "full_tensor") else t for key, t in state.items()}


def test_weights_are_bitwise_those_of_direct_construction(ranks: RankPool) -> None:
    for name in ("gpt", "dit", "resnet"):
        torch.manual_seed(SEED)
        expected = globals()[name]().state_dict()
        for world, strategy, replicate in ((2, "fsdp", 1), (2, "ddp", 1), (4, "hsdp", 2), (4, "fsdp", 1)):
            for weights in ranks(world, sharded_weights, name, strategy, replicate):
                assert weights.keys() == expected.keys()
                for key, value in expected.items():
                    assert torch.equal(weights[key], value), (name, strategy, world, key)
