"""A forward that needs no data: every unit of sharding uses its own parameters once, in order."""

from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from launch.planning.ledger import Ledger


class Touching:
    """A task whose forward is `touch_parameters`; what follows a forward, up to the averages, is the backward."""

    primary_metric = "loss"
    higher_is_better: Collection[str] = ()
    metric_units: Mapping[str, str] = MappingProxyType({})

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def losses(self, model: nn.Module, batch: Any, random: Any) -> Tensor:
        with self._ledger.counting("forward"):
            losses: Tensor = model(torch.zeros(1))
        self._ledger.phase = "backward"
        return losses

    def metrics(self, model: nn.Module, batch: Any, random: Any) -> dict[str, Tensor]:
        return {}

    def tokens_per_sample(self, batch: Any) -> int:
        return 0


def touch_parameters(module: nn.Module) -> None:
    """Give every unit of sharding in `module` a forward that uses its own parameters and calls the units in it.

    The units are those of FSDP2, and `module`.
    """
    inner = list(_units_in(module))
    foreign = {id(part) for unit in inner for part in unit.modules()}
    own = [part for part in module.modules() if id(part) not in foreign]

    def forward(x: Tensor) -> Tensor:
        for part in own:
            for parameter in part._parameters.values():
                if parameter is not None:
                    # The gradient of the whole parameter is made at once, as a layer's backward makes it.
                    x = x + parameter.sum().to(x.dtype)
        for unit in inner:
            x = unit(x)
        return x

    setattr(module, "forward", forward)  # noqa: B010
    for unit in inner:
        touch_parameters(unit)


def _units_in(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, FSDPModule):
            yield child
        else:
            yield from _units_in(child)


def reduce_bucket(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What DDP does with a bucket by itself, but where nothing is sent the future of its all-reduce holds no result."""
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
