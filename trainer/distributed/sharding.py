"""How a model is laid over the processes: none, DDP, FSDP2, HSDP.

    network = shard(lambda: GPT(...), config.sharding, processes, seed=0)
    with network.accumulating(last=True):
        task.losses(network.forward, batch, random).mean().backward()

Order inside a block: activation checkpointing, then `torch.compile`, then the FSDP hooks around both. The first
two replace the block's `forward`, never the module, so parameters keep their names.
"""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from trainer.config.schema import PRECISIONS, ShardingConfig
from trainer.distributed.materialize import Materializes, materialize
from trainer.distributed.processes import Processes
from trainer.errors import ConfigError

SHARDED = ("fsdp", "hsdp")


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
    make: Callable[[], nn.Module], config: ShardingConfig, processes: Processes, *, on_meta: bool, seed: int
) -> Network:
    """Build the model and lay it over the processes.

    Args:
        make: builds the model on the current default device.
        config: `conf/sharding`.
        processes: from `trainer.distributed.processes.join`; the process group is joined.
        on_meta: the model's class has `init_weights`, so it is built without memory, sharded, then filled. Any
            other class is built whole on every rank, from the same seed, and then sharded.
        seed: of the initial weights.

    Collectives: mesh construction; DDP broadcasts its parameters once.
    """
    torch.manual_seed(seed)
    with torch.device("meta") if on_meta else nullcontext():
        module = make()
    blocks = shard_blocks(module, config)
    for block in blocks:
        _wrap_forward(block, config)
    if config.strategy in SHARDED:
        _fully_shard(module, blocks, config, processes)
    if on_meta:
        materialize(module, processes.device, seed)
    else:
        module.to(processes.device)
    forward = module
    if config.strategy == "ddp":
        ids = [processes.device] if processes.device.type == "cuda" else None
        with warnings.catch_warnings():
            # torch 2.13 renames the argument; 2.11 knows the old name only.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            # Statistics are averaged once a step for every strategy alike (`sync_buffers`).
            forward = DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)
    dtype = None if config.strategy in SHARDED else _dtype(config.param_dtype)
    autocast_dtype = None if dtype == torch.float32 else dtype
    return Network(module, forward, autocast_dtype, processes.device, batchnorm_statistics(module))


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


def _fully_shard(
    module: nn.Module, blocks: list[nn.Module], config: ShardingConfig, processes: Processes
) -> None:
    policy = MixedPrecisionPolicy(
        param_dtype=_dtype(config.param_dtype),
        reduce_dtype=_dtype(config.reduce_dtype or config.param_dtype),
        # Our models cast what they compute with; times in [0, 1000] must not be rounded to bfloat16 on the way in.
        cast_forward_inputs=not isinstance(module, Materializes),
    )
    options: dict[str, Any] = {"mesh": make_mesh(config, processes), "mp_policy": policy}
    for block in blocks:
        fully_shard(block, reshard_after_forward=config.reshard_after_forward, **options)
    fully_shard(module, reshard_after_forward=config.reshard_after_forward, **options)


def make_mesh(config: ShardingConfig, processes: Processes) -> DeviceMesh:
    """One dimension for FSDP; replicas outside, shards inside for HSDP."""
    kind = processes.device.type
    if config.strategy == "hsdp":
        shape = (config.replicate, processes.world_size // config.replicate)
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
        if processes.timeout is not None:
            for group in mesh.get_all_groups():
                # A mesh's own groups take torch's time-out, not that of the default group, and cannot be told at birth.
                _set_pg_timeout(processes.timeout, group)
        return mesh
    return init_device_mesh(kind, (processes.world_size,), mesh_dim_names=("shard",))


def forget_meshes() -> None:
    """Drop what DTensor still knows of the meshes of models that are gone, so that their process group can end.

    While anything holds a mesh, leaving the group does not end gloo's threads; one that lets go of its last tensor
    while Python shuts down then aborts the process ("terminate called without an active exception").
    """
    _clear_sharding_prop_cache()
    gc.collect()


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, PRECISIONS[name])
