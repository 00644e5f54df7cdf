"""Sharded models: reset FSDP2 to its sharded parameters, and refuse sharding that hides the weights."""

import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_fsdp(module: nn.Module) -> bool:
    """Return whether FSDP2 (`fully_shard`) manages parameters of `module`."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def reshard(modules: list[Any]) -> None:
    """Register the sharded parameters of FSDP2 modules, also after a forward that failed. No collective.

    FSDP2 does not reshard within a forward, and an exception leaves it there. Only its reset ends that state.
    """
    for module in modules:
        module.reshard()
        state = module._get_fsdp_state()
        if any(not group.is_sharded for group in state._fsdp_param_groups):
            root = next((one for one in state._state_ctx.all_states if one._is_root), state)
            root._reset_iter_state()


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
