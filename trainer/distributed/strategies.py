"""Built-in functions that shard a model (`trainer.protocols.ShardModel`), which `sharding.strategy` selects."""

import warnings
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from trainer.config.schema import ShardingConfig
from trainer.distributed.materialize import Materializes
from trainer.distributed.processes import Processes
from trainer.distributed.sharding import dtype_of, shard_blocks


def none(model: nn.Module, processes: Processes, settings: ShardingConfig) -> nn.Module:
    """Return the model unchanged."""
    return model


def ddp(model: nn.Module, processes: Processes, settings: ShardingConfig) -> nn.Module:
    """Wrap the model in DDP, which broadcasts the parameters of rank 0 once."""
    ids = [processes.device] if processes.device.type == "cuda" else None
    with warnings.catch_warnings():
        # torch 2.13 renames the argument; 2.11 accepts only the old name.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        # With every strategy, `TrainingBuffers.share` makes the buffers equal once a step.
        return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)


def fsdp(model: nn.Module, processes: Processes, settings: ShardingConfig) -> nn.Module:
    """Shard the parameters over all processes with FSDP2."""
    mesh = init_device_mesh(processes.device.type, (processes.world_size,), mesh_dim_names=("shard",))
    return fully_shard_blocks(model, mesh, settings)


def hsdp(model: nn.Module, processes: Processes, settings: ShardingConfig) -> nn.Module:
    """Shard the parameters inside each of `sharding.replicate` groups of processes; the groups are replicas."""
    shape = (settings.replicate, processes.world_size // settings.replicate)
    mesh = init_device_mesh(processes.device.type, shape, mesh_dim_names=("replicate", "shard"))
    return fully_shard_blocks(model, mesh, settings)


def fully_shard_blocks(model: nn.Module, mesh: DeviceMesh, settings: ShardingConfig) -> nn.Module:
    """Apply FSDP2 to each block of the model, then to the rest, with the precision of `settings`.

    Args:
        model: model to shard in place; `trainer.distributed.sharding.shard_blocks` selects its blocks.
        mesh: mesh with one dimension for FSDP, or with the dimensions (replicas, shards) for HSDP.
        settings: settings of which `param_dtype`, `reduce_dtype`, `reshard_after_forward` and `block_classes` are used.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=dtype_of(settings.param_dtype),
        reduce_dtype=dtype_of(settings.reduce_dtype or settings.param_dtype),
        # The models of this project cast their inputs themselves. FSDP2 would round a time in [0, 1000] to bfloat16.
        cast_forward_inputs=not isinstance(model, Materializes),
    )
    options: dict[str, Any] = {"reshard_after_forward": settings.reshard_after_forward}
    for part in (*shard_blocks(model, settings), model):
        fully_shard(part, mesh=mesh, mp_policy=policy, **options)
    return model
