"""Sharded models: reset FSDP2, let it gather other weights, and refuse sharding that hides the weights."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ema.memory import local
from ema.shards import part_for


def is_fsdp(module: nn.Module) -> bool:
    """Return whether FSDP2 (`fully_shard`) manages parameters of `module`."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def reshard(modules: list[Any]) -> None:
    """Register the sharded parameters of FSDP2 modules, also after a forward that failed. No collective.

    FSDP2 does not reshard within a forward, and an exception leaves it there. Only its reset ends that state.
    A prefetch that no forward has used must end too, because it has the weights of before.
    """
    for module in modules:
        state = module._get_fsdp_state()
        for group in state._fsdp_param_groups:
            group.wait_for_unshard()
        module.reshard()
        if any(not group.is_sharded for group in state._fsdp_param_groups):
            root = next((one for one in state._state_ctx.all_states if one._is_root), state)
            root._reset_iter_state()


@contextmanager
def gathering(modules: list[Any], values: Mapping[int, Tensor]) -> Iterator[None]:
    """Let the FSDP2 modules gather other weights inside the context; their own shards are neither read nor written.

    Each block reads its weights when it gathers them, so what must be cast, padded or moved is copied for one block.
    A forward inside leaves no trace: the order in which a backward prefetches is that of before.

    Args:
        modules: FSDP2 modules, resharded, parents before their children; none is in a forward or backward.
        values: new weights, whole or sharded as the parameter, by id of the sharded parameter.

    Raises:
        ValueError: A parameter chooses by itself what it sends (`fsdp_pre_all_gather`).
    """
    states = [module._get_fsdp_state() for module in modules]
    for state in states:
        if state._is_root is None:
            state._lazy_init()  # it reads the shards once
    groups = {id(group): group for state in states for group in state._fsdp_param_groups}.values()
    reshard(modules)
    parameters = [one for group in groups for one in group.fsdp_params if id(one.sharded_param) in values]
    for one in parameters:
        if hasattr(local(one.sharded_param), "fsdp_pre_all_gather"):
            raise ValueError(
                f"{one._param_fqn!r} has an fsdp_pre_all_gather of its own: an average cannot take its place"
            )
    orders = {id(group.comm_ctx): group.comm_ctx.post_forward_order for group in groups}.values()
    kept_orders = [(order, list(order)) for order in orders]
    kept = [(group, list(group._post_forward_indices), group._partial_reduce_output) for group in groups]
    try:
        for one in parameters:
            one.__dict__["_average"] = partial(_padded, one, values[id(one.sharded_param)])
            one.__class__ = _gathering_average(one.__class__)
        yield
    finally:
        reshard(modules)
        for one in parameters:
            if one.__dict__.pop("_average", None) is not None:
                one.__class__ = type(one).__base__
        for order, before in kept_orders:
            order[:] = before
        for group, indices, partial_output in kept:
            group._post_forward_indices[:] = indices
            group._partial_reduce_output = partial_output


@cache
def _gathering_average(cls: Any) -> type:
    """Return the subclass of FSDP2's `FSDPParam` that gathers what its attribute `_average` returns."""
    return type(cls.__name__, (cls,), {"_sharded_param_data": property(lambda one: one._average())})


def _padded(one: Any, value: Tensor) -> Tensor:
    """Return this rank's part of `value` as FSDP2 gathers it: flat, as large as the largest shard."""
    shard = local(one.sharded_param)
    part = part_for(one.sharded_param, value).to(shard.device, shard.dtype)
    if part.shape != one.padded_sharded_param_size:
        short, part = part, part.new_zeros(one.padded_sharded_param_size)
        part.narrow(one.fsdp_placement.dim, 0, short.size(one.fsdp_placement.dim)).copy_(short)
    return part.reshape(-1)


def give_back(parameter: nn.Parameter, shard: Tensor, spec: Any) -> None:
    """Make `shard` this rank's part of a parameter that was converted to another dtype or device; then `adopt` it."""
    from torch.distributed.tensor import DTensor

    whole = DTensor(shard, spec, requires_grad=False)
    torch.utils.swap_tensors(parameter, nn.Parameter(whole, requires_grad=parameter.requires_grad))


def adopt(modules: list[Any]) -> None:
    """Let FSDP2 use the parameters that are registered now. No collective."""
    for module in modules:
        for group in module._get_fsdp_state()._fsdp_param_groups:
            for parameter in group.fsdp_params:
                parameter.reset_sharded_param()


def refuse_foreign_sharding(path: str, module: nn.Module) -> None:
    """Raise a ValueError if FSDP1 or DeepSpeed ZeRO-3 keeps the weights of `module` elsewhere.

    Their registered parameters are flat, empty, or parts of the weights without a record of it.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
        raise ValueError(
            _message(path or type(module).__name__, "is sharded by FSDP1 (FullyShardedDataParallel)")
        )
    for key, parameter in module._parameters.items():
        name = f"{path}.{key}" if path else key
        if getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False):
            raise ValueError(_message(name, "is a parameter of FSDP1"))
        if hasattr(parameter, "ds_id"):
            raise ValueError(_message(name, "is a placeholder of DeepSpeed ZeRO-3"))


def _message(name: str, kind: str) -> str:
    return f"{name!r} {kind}: it cannot be averaged; shard the model with FSDP2 (fully_shard) instead"
