"""After a step every rank has the same buffers, under each strategy."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.ranks import RankPool
from trainer.config.schema import ShardingConfig
from trainer.distributed.processes import Processes
from trainer.distributed.sharding import shard


class Followers(nn.Module):
    """Buffers of each kind that follow the data of a rank, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4, momentum=1.0)
        self.exact = nn.BatchNorm1d(4, momentum=1.0, affine=False, dtype=torch.float64)
        self.picture = nn.InstanceNorm1d(4, momentum=1.0, track_running_stats=True)
        self.register_buffer("centre", torch.zeros(4))
        self.register_buffer("replaced", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("pointer", torch.tensor(0))
        self.register_buffer("small", torch.zeros(1, dtype=torch.int16))
        self.register_buffer("seen", torch.tensor([False, False]))
        self.register_buffer("own", torch.zeros(1), persistent=False)
        self.register_buffer("expanded", torch.ones(1).expand(3))

    def forward(self, x: Tensor) -> Tensor:
        rank = dist.get_rank()
        self.centre.data.copy_(x.mean(0))
        self.replaced = x.mean(0).double()
        self.pointer += rank + 1
        self.small += rank + 1
        self.seen[rank % 2] = True
        self.own.fill_(rank)
        self.exact(x.double() / 3)
        return self.head(self.norm(x) + self.picture(x[:, :, None].expand(-1, -1, 2))[:, :, 0])


def buffers_after_a_step(strategy: str, replicate: int) -> dict[str, Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    config = ShardingConfig(strategy=strategy, replicate=replicate)
    processes = Processes(rank, world, torch.device("cpu"))
    network = shard(Followers, config, processes, on_meta=False, seed=0)
    network.buffers.save()
    network.forward.train()
    network.forward(inputs(rank)).sum().backward()
    network.buffers.restore_unless(torch.tensor(True))
    network.buffers.share()
    return {name: buffer.clone() for name, buffer in network.module.named_buffers()}


def inputs(rank: int) -> Tensor:
    return torch.arange(32.0).reshape(8, 4).square() + 100 * rank


def test_statistics_of_norms_get_their_mean_and_other_buffers_the_values_of_rank_0(ranks: RankPool) -> None:
    for world, strategy, replicate in ((2, "ddp", 1), (2, "fsdp", 1), (4, "hsdp", 2)):
        for rank, found in enumerate(ranks(world, buffers_after_a_step, strategy, replicate)):
            means = torch.stack([inputs(other).mean(0) for other in range(world)])
            torch.testing.assert_close(found["norm.running_mean"], means.mean(0))
            torch.testing.assert_close(found["picture.running_mean"], means.mean(0))
            thirds = torch.stack([(inputs(other).double() / 3).mean(0) for other in range(world)]).mean(0)
            torch.testing.assert_close(found["exact.running_mean"], thirds, rtol=1e-14, atol=0)
            assert torch.equal(found["centre"], means[0])
            assert torch.equal(found["replaced"], means[0].double())
            assert found["pointer"] == found["norm.num_batches_tracked"] == 1
            assert found["small"] == 1, "a dtype that gloo and NCCL do not send"
            assert found["seen"].tolist() == [True, False]
            assert found["own"].item() == rank, "a buffer that is not saved is the rank's own"
            assert found["expanded"].tolist() == [1, 1, 1]
