"""Distribute a model over the processes, with a function of `trainer.distributed.strategies` or the user's own.

    network = shard(lambda: GPT(...), config.sharding, processes, seed=0)
    with network.accumulating(last=True):
        task.losses(network.forward, batch, random).mean().backward()

Each block gets activation checkpointing first, then `torch.compile`, then the hooks of the sharding; a block with
buffers is compiled first. The first two replace the block's `forward`, never the module, so parameters keep their
names.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ema.names import named_modules
from trainer.config.schema import PRECISIONS, ShardingConfig
from trainer.config.targets import bind
from trainer.config.trust import resolve_target
from trainer.distributed.buffers import TrainingBuffers, repeated_once
from trainer.distributed.materialize import Materializes, construct, materialize
from trainer.distributed.processes import Processes
from trainer.errors import ConfigError, blamed_on


@dataclass
class Network:
    """The distributed model, its training forward, and what a forward needs: device, precision, part of the batch."""

    module: nn.Module
    """The model; FSDP2 shards it in place. Averages, checkpoints and evaluations use it."""
    forward: nn.Module
    """Module that the training forward calls: `module`, or a wrapper of it such as DDP."""
    autocast_dtype: torch.dtype | None
    """Dtype of autocast in every forward; None if FSDP2 casts the parameters or everything is float32."""
    device: torch.device
    data_part: tuple[int, int] | None = None
    """Index and number of the parts of each batch, as in `Processes.data_part`."""
    built_whole: bool = False
    """Whether every rank built the whole model in host memory, because it cannot be built on the meta device."""
    loads_weights: bool = False
    """Whether that is because the constructor loads weights; then `init_weights` was not called."""
    buffers: TrainingBuffers = field(init=False)
    """Buffers of `module`; each rank's forwards change them by its own samples."""

    def __post_init__(self) -> None:
        self.buffers = TrainingBuffers(self.module)

    @property
    def needs_all_gradients(self) -> bool:
        """Whether a backward must reach every trainable parameter: DDP waits for the others for ever."""
        return isinstance(self.forward, DistributedDataParallel) and not self.forward.find_unused_parameters

    def autocast(self) -> Any:
        """Return the context in which every forward runs: autocast to `autocast_dtype`, or none."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Run the forward and backward of one micro-batch inside; gradients are synchronised only for the last one."""
        if isinstance(self.forward, FSDPModule):
            self.forward.set_requires_gradient_sync(last)
        elif isinstance(self.forward, DistributedDataParallel) and not last:
            with self.forward.no_sync():
                yield
            return
        yield


def reshard(model: nn.Module) -> None:
    """Free the parameters that stay gathered after a forward without a backward (the root's, under FSDP2)."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Return the name of each parameter in the unwrapped model; a tied parameter has its first name.

    A parameter that the model's own `named_parameters` leaves out is left out.
    """
    reshard(model)
    shown, names = set(model.parameters()), dict[nn.Parameter, str]()
    for path, module in named_modules(model):
        for key, parameter in module.named_parameters(recurse=False):
            if parameter in shown:
                names.setdefault(parameter, f"{path}.{key}" if path else key)
    return names


def shard(
    make: Callable[[], nn.Module],
    config: ShardingConfig,
    processes: Processes,
    *,
    on_meta: bool,
    seed: int,
    allowed: Sequence[str] = (),
) -> Network:
    """Build the model and distribute it over the processes.

    Args:
        make: function that builds the model on the current default device.
        config: group `sharding` of the configuration.
        processes: this process, as `trainer.distributed.processes.join` returned it.
        on_meta: whether the model is built on the meta device, then sharded, then gets its memory and its weights from
            `init_weights`. If not, or if its constructor loads weights, every rank builds the whole model from the same
            seed before it is sharded.
        seed: seed of the initial weights.
        allowed: further prefixes that `sharding._target_` may start with.

    Raises:
        ConfigError: The sharding function is not allowed, does not exist, refuses an argument, or fails.

    Collectives: those of the sharding function.
    """
    shards = _sharding_function(config, allowed)
    module, is_meta = construct(make, on_meta=on_meta, seed=seed)
    for block in shard_blocks(module, config):
        _wrap_forward(block, config)
    if config.shards:  # shard first, so that no rank allocates the whole model
        forward, data_part = _apply(shards, module, config, processes)
    if is_meta:
        materialize(module, processes.device, seed)
    else:
        module.to(processes.device)
    if not config.shards:
        forward, data_part = _apply(shards, module, config, processes)
    _limit_waiting(module, processes)
    # FSDP2 casts the parameters itself.
    dtype = None if isinstance(module, FSDPModule) else dtype_of(config.param_dtype)
    autocast_dtype = None if dtype == torch.float32 else dtype
    return Network(
        module,
        forward,
        autocast_dtype,
        processes.device,
        data_part,
        built_whole=not is_meta,
        loads_weights=on_meta and not is_meta,
    )


def _sharding_function(config: ShardingConfig, allowed: Sequence[str]) -> Callable[..., Any]:
    target = config._target_ or f"trainer.distributed.strategies.{config.strategy}"
    function = resolve_target({"_target_": target}, group="sharding", allowed=allowed)
    return bind(function, config.args, key="sharding.args", called_with=("model", "processes", "settings"))


def _apply(
    shards: Callable[..., Any], module: nn.Module, config: ShardingConfig, processes: Processes
) -> tuple[nn.Module, tuple[int, int] | None]:
    """Shard the module; return the module of the training forward, and `Processes.data_part` for this rank."""
    with blamed_on("sharding"):
        result = shards(module, processes, config)
    forward, mesh = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(forward, nn.Module) or not isinstance(mesh, DeviceMesh | None):
        raise ConfigError(
            f"sharding._target_: expected the model, or the model and its data-parallel mesh, got {result!r:.100}"
        )
    if mesh is None:
        return forward, None
    place = mesh.get_coordinate()
    if place is None or processes.world_size % mesh.size():
        raise ConfigError(
            f"sharding._target_: expected each of {processes.world_size} ranks in a data-parallel mesh, got {mesh}"
        )
    part = 0
    for dim, index in enumerate(place):
        part = part * mesh.size(dim) + index
    return forward, (part, mesh.size())


def _limit_waiting(module: nn.Module, processes: Processes) -> None:
    """Set the run's time-out for the groups of all meshes, because torch makes them with its own default time-out."""
    if processes.timeout is None:
        return
    for mesh in {
        parameter.device_mesh for parameter in module.parameters() if isinstance(parameter, DTensor)
    }:
        for group in mesh.get_all_groups():
            _set_pg_timeout(processes.timeout, group)


def shard_blocks(module: nn.Module, config: ShardingConfig) -> list[nn.Module]:
    """Return the modules that are sharded, checkpointed and compiled one by one.

    They are the first of these that exist: the classes in `sharding.block_classes`; the model's own `shard_blocks()`;
    the classes in `_no_split_modules` (transformers, diffusers); the members of its ModuleLists.

    Raises:
        ConfigError: `sharding.block_classes` names a class that the model does not contain.
    """
    names = set(config.block_classes)
    if not names and isinstance(module, Materializes):
        return list(module.shard_blocks())
    names = names or set(getattr(module, "_no_split_modules", None) or ())
    blocks = [m for m in module.modules() if type(m).__name__ in names]
    missing = sorted(set(config.block_classes) - {type(m).__name__ for m in blocks})
    if missing:
        raise ConfigError(
            f"sharding.block_classes: {type(module).__name__} contains no module of class {missing[0]}"
        )
    if blocks:
        return blocks
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    inner = {id(child) for outer in lists for m in outer for child in m.modules() if child is not m}
    return [m for outer in lists for m in outer if id(m) not in inner]


def _wrap_forward(block: nn.Module, config: ShardingConfig) -> None:
    has_buffers = any(True for _ in block.buffers())
    if config.activation_checkpointing and has_buffers:
        if config.compile:  # inside, because torch cannot compile a checkpoint with a context
            block.forward = torch.compile(block.forward)
        block.forward = _checkpointed(block.forward, context_fn=repeated_once(block))
        return
    if config.activation_checkpointing:
        block.forward = _checkpointed(block.forward)
    if config.compile:
        block.forward = torch.compile(block.forward)


def _checkpointed(forward: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)

    return recomputed


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return the dtype with a name of `trainer.config.schema.PRECISIONS`; None for None."""
    return None if name is None else getattr(torch, PRECISIONS[name])
