"""Forward pass without data, in which every FSDP2 unit uses its own parameters once, in order."""

from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from launch.planning.ledger import Ledger


class Touching:
    """Task for a model whose forward was replaced by `touch_parameters`; it sets the ledger's phases.

    Everything after a forward counts as backward until the averages are updated.
    """

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
    """Replace the forward of `module` and of all FSDP2 units in it.

    Each new forward uses the unit's own parameters and then calls the units directly below it.
    """
    inner = list(_units_in(module))
    foreign = {id(part) for unit in inner for part in unit.modules()}
    own = [part for part in module.modules() if id(part) not in foreign]

    def forward(x: Tensor) -> Tensor:
        for part in own:
            for parameter in part.parameters(recurse=False):
                # The backward of this sum makes the full gradient at once, as the backward of a layer does.
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
    """Reduce a gradient bucket as DDP does by default, in a process group that sends no data.

    DDP's own hook waits for the result of the all-reduce, which does not exist in such a group.
    """
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
