"""Lays a model over the processes, with a built-in function (`trainer.distributed.strategies`) or the user's own.

    network = shard(lambda: GPT(...), config.sharding, processes, seed=0)
    with network.accumulating(last=True):
        task.losses(network.forward, batch, random).mean().backward()

Order inside a block: activation checkpointing, then `torch.compile`, then the hooks of the sharding. The first
two replace the block's `forward`, never the module, so parameters keep their names.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from trainer.config.schema import PRECISIONS, ShardingConfig
from trainer.config.targets import bind, resolve_target
from trainer.distributed.materialize import Materializes, materialize
from trainer.distributed.processes import Processes
from trainer.errors import ConfigError, blamed_on


@dataclass
class Network:
    """The model as the loop uses it."""

    module: nn.Module
    """The model itself; sharded in place under FSDP2. Averages, checkpoints and evaluations use it."""
    forward: nn.Module
    """What the training forward calls: `module`, or DDP around it."""
    autocast_dtype: torch.dtype | None
    """Reduced precision of the forward where FSDP2 does not cast the parameters itself."""
    device: torch.device
    statistics: list[Tensor] = field(default_factory=list)
    """Running means and variances of BatchNorm layers, which each rank gathers from its own samples."""
    data_part: tuple[int, int] | None = None
    """As in `Processes`."""

    def autocast(self) -> Any:
        """Context of every forward."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Context of one micro-batch's forward and backward: gradients are synchronised in the last one only."""
        if isinstance(self.forward, FSDPModule):
            self.forward.set_requires_gradient_sync(last)
            yield
        elif isinstance(self.forward, DistributedDataParallel) and not last:
            with self.forward.no_sync():
                yield
        else:
            yield

    def reshard(self) -> None:
        """Free parameters that a forward without a backward left gathered (the root's, under FSDP2)."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def sync_buffers(self) -> None:
        """Average the BatchNorm statistics over the ranks, so that all hold the same ones.

        Collectives: one all-reduce if the model has BatchNorm layers and there are several ranks.
        """
        if not self.statistics or dist.get_world_size() == 1:
            return
        flat = torch.cat([buffer.reshape(-1).float() for buffer in self.statistics])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        sizes = [buffer.numel() for buffer in self.statistics]
        for buffer, mean in zip(self.statistics, flat.split(sizes), strict=True):
            buffer.copy_(mean.view_as(buffer))


def batchnorm_statistics(module: nn.Module) -> list[Tensor]:
    """Running mean and variance of every BatchNorm layer that keeps them."""
    layers = [child for child in module.modules() if isinstance(child, _BatchNorm)]
    return [
        buffer for layer in layers for buffer in (layer.running_mean, layer.running_var) if buffer is not None
    ]


def shard(
    make: Callable[[], nn.Module],
    config: ShardingConfig,
    processes: Processes,
    *,
    on_meta: bool,
    seed: int,
    allowed: Sequence[str] = (),
) -> Network:
    """Build the model and lay it over the processes.

    Args:
        make: builds the model on the current default device.
        config: `conf/sharding`.
        processes: from `trainer.distributed.processes.join`; the process group is joined.
        on_meta: the model's class has `init_weights`, so it is built without memory, sharded, then filled. Any
            other class is built whole on every rank, from the same seed, and then sharded.
        seed: of the initial weights.
        allowed: further prefixes that `sharding._target_` may start with.

    Raises:
        ConfigError: a target that is not allowed or not there, an argument that it does not take, or any error of it.

    Collectives: those of the sharding function.
    """
    shards = _sharding_function(config, allowed)
    torch.manual_seed(seed)
    with torch.device("meta") if on_meta else nullcontext():
        module = make()
    for block in shard_blocks(module, config):
        _wrap_forward(block, config)
    if config.shards:  # cut before there is memory for the whole
        forward, data_part = _apply(shards, module, config, processes)
    if on_meta:
        materialize(module, processes.device, seed)
    else:
        module.to(processes.device)
    if not config.shards:
        forward, data_part = _apply(shards, module, config, processes)
    _limit_waiting(module, processes)
    # FSDP2 casts the parameters itself.
    dtype = None if isinstance(module, FSDPModule) else dtype_of(config.param_dtype)
    autocast_dtype = None if dtype == torch.float32 else dtype
    statistics = batchnorm_statistics(module)
    return Network(module, forward, autocast_dtype, processes.device, statistics, data_part)


def _sharding_function(config: ShardingConfig, allowed: Sequence[str]) -> Callable[..., Any]:
    target = config._target_ or f"trainer.distributed.strategies.{config.strategy}"
    function = resolve_target({"_target_": target}, group="sharding", allowed=allowed)
    return bind(function, config.args, key="sharding.args", called_with=("model", "processes", "settings"))


def _apply(
    shards: Callable[..., Any], module: nn.Module, config: ShardingConfig, processes: Processes
) -> tuple[nn.Module, tuple[int, int] | None]:
    """Shard the module; what the training forward calls, and this rank's part of each batch (None: its own)."""
    with blamed_on("sharding"):
        answer = shards(module, processes, config)
    forward, mesh = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, None)
    if not isinstance(forward, nn.Module) or not isinstance(mesh, DeviceMesh | None):
        raise ConfigError(
            f"sharding._target_: expected the model, or the model and the mesh of the data, got {answer!r:.100}"
        )
    if mesh is None:
        return forward, None
    place = mesh.get_coordinate()
    if place is None or processes.world_size % mesh.size():
        raise ConfigError(
            f"sharding._target_: expected each of {processes.world_size} ranks in a mesh of the data, got {mesh}"
        )
    part = 0
    for dim, index in enumerate(place):
        part = part * mesh.size(dim) + index
    return forward, (part, mesh.size())


def _limit_waiting(module: nn.Module, processes: Processes) -> None:
    """Give the groups of all meshes the run's time-out: they are made with torch's, not that of the default group."""
    if processes.timeout is None:
        return
    for mesh in {
        parameter.device_mesh for parameter in module.parameters() if isinstance(parameter, DTensor)
    }:
        for group in mesh.get_all_groups():
            _set_pg_timeout(processes.timeout, group)


def shard_blocks(module: nn.Module, config: ShardingConfig) -> list[nn.Module]:
    """The modules that are sharded, checkpointed and compiled one by one.

    `sharding.block_classes` decides; else the model's own `shard_blocks()`; else the class names in
    `_no_split_modules` (transformers, diffusers); else the members of its ModuleLists.

    Raises:
        ConfigError: `sharding.block_classes` names a class that the model does not contain.
    """
    names = set(config.block_classes)
    if not names and isinstance(module, Materializes):
        return list(module.shard_blocks())
    names = names or set(getattr(module, "_no_split_modules", None) or ())
    found = [m for m in module.modules() if type(m).__name__ in names]
    missing = sorted(set(config.block_classes) - {type(m).__name__ for m in found})
    if missing:
        raise ConfigError(
            f"sharding.block_classes: {type(module).__name__} contains no module of class {missing[0]}"
        )
    if found:
        return found
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    inner = {id(child) for outer in lists for m in outer for child in m.modules() if child is not m}
    return [m for outer in lists for m in outer if id(m) not in inner]


def _wrap_forward(block: nn.Module, config: ShardingConfig) -> None:
    if config.activation_checkpointing:
        forward = block.forward

        def recomputed(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        block.forward = recomputed
    if config.compile:
        block.forward = torch.compile(block.forward)


def forget_meshes() -> None:
    """Drop what DTensor still knows of the meshes of models that are gone, so that their process group can end.

    While anything holds a mesh, leaving the group does not end gloo's threads; one that lets go of its last tensor
    while Python shuts down then aborts the process ("terminate called without an active exception").
    """
    _clear_sharding_prop_cache()
    gc.collect()


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype of a name in `trainer.config.schema.PRECISIONS`; None for None."""
    return None if name is None else getattr(torch, PRECISIONS[name])
