"""Weights, buffers and optimizer state as one nested dict for `trainer.checkpoint.store`, by the bare model's names."""

from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ema import is_swapped
from trainer.checkpoint.format import CheckpointMisfit
from trainer.checkpoint.store import load_checkpoint, stored_scalars, stored_tensors
from trainer.distributed.processes import agreeing
from trainer.errors import ConfigError

_WRAPPER_NAMES = ("_orig_mod", "_checkpoint_wrapped_module")
_OPTIMIZER = "optimizer/state/"


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The weights and buffers of a model and the state of its optimizer, by the names the bare model gives them.

    Wrappers (DDP, `torch.compile`, activation checkpointing) do not show in the names. Nothing is copied or gathered:
    tensors are the live ones, and FSDP2 shards are DTensors. What a parameter group sets (rates, betas) is the
    config's and not part of it.

    Unlike torch's `get_optimizer_state_dict` this never steps a fresh optimizer to learn its keys, which would leave
    Adam's step count at 1: a checkpoint taken before the first step resumes as before the first step.

    Raises:
        ValueError: the optimizer holds a parameter that the model does not have (it was made before sharding).
        RuntimeError: an average is swapped into the model: its weights would be saved as the live ones.
    """
    if is_swapped(model):
        raise RuntimeError("cannot save the model while an average is swapped into it")
    names = _parameter_names(model)
    entries = {}
    for parameter in chain.from_iterable(group["params"] for group in optimizer.param_groups):
        if parameter not in names:
            raise ValueError("training_state: the optimizer holds a parameter that the model does not have")
        if parameter in optimizer.state:
            entries[names[parameter]] = dict(optimizer.state[parameter])
    kind = {"class": type(optimizer).__name__, "entries": len(entries)}
    return {"model": get_model_state_dict(model), "optimizer": {**kind, "state": entries}}


def load_training_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, others: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Load a checkpoint whose state was `{**training_state(model, optimizer), **others}`, in place.

    The optimizer's entries are made as the checkpoint lists them, whether or not it has stepped or any gradient is
    set, and sharded as its parameters are. Collective like `load_checkpoint`.

    Args:
        path: a committed checkpoint.
        model: built and sharded.
        optimizer: over that model's parameters.
        others: more tensors to overwrite, nested as saved (the averages); JSON values need not be given.

    Returns:
        As `load_checkpoint`.

    Raises:
        CheckpointError: naming what is missing, unexpected or of another shape, or what is damaged.
        ConfigError: another optimizer saved it.
    """
    with agreeing("reading the checkpoint's index", Exception):
        scalars, stored = stored_scalars(path), stored_tensors(path)
    kind = scalars.get("optimizer", {})
    if kind.get("class") != type(optimizer).__name__:
        raise ConfigError(
            f"optimizer.name: {path} was saved with {kind.get('class')}; got {type(optimizer).__name__}"
        )
    parameters = {name: parameter for parameter, name in _parameter_names(model).items()}
    weights = _weights(path, stored, model)
    entries: dict[str, dict[str, Any]] = {}
    for key, like in stored.items():
        if key.startswith(_OPTIMIZER):
            name, _, field = key.removeprefix(_OPTIMIZER).rpartition("/")
            if name not in parameters:
                raise CheckpointMisfit(f"{path} has {key}, and the model has no such parameter", key)
            entries.setdefault(name, {})[field] = _empty_entry(field, like, parameters[name])
    loaded = _load(path, model, weights, {**(others or {}), "optimizer": {"state": entries}})
    _install(optimizer, {parameters[name]: entry for name, entry in loaded["optimizer"]["state"].items()})
    if len(optimizer.state) != kind.get("entries"):
        raise RuntimeError(
            f"{len(optimizer.state)} optimizer entries came out of {path}; expected {kind.get('entries')}"
        )
    return loaded


def load_weights(path: Path, model: nn.Module, others: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Load the weights and buffers of a checkpoint, and the tensors of `others`; what else is stored is left out.

    Arguments, result and collectives as `load_training_state`, which is this and the optimizer.

    Raises:
        CheckpointError: naming what is missing, unexpected or of another shape, or what is damaged.
    """
    with agreeing("reading the checkpoint's index", Exception):
        stored = stored_tensors(path)
    return _load(path, model, _weights(path, stored, model), others or {})


def _weights(path: Path, stored: Iterable[str], model: nn.Module) -> dict[str, Any]:
    """What of the model a checkpoint overwrites, after a look whether it holds anything else."""
    _reshard(model)
    weights = get_model_state_dict(model)
    for key in stored:
        if key.startswith("model/") and key.removeprefix("model/") not in weights:
            raise CheckpointMisfit(f"{path} has {key}, and the model has no such tensor", key)
    return weights


def _load(
    path: Path, model: nn.Module, weights: Mapping[str, Any], others: Mapping[str, Any]
) -> dict[str, Any]:
    # The model first: what else does not fit a model that fits is not the model's fault.
    loaded = load_checkpoint(path, {"model": weights, **others})
    # The weights are in place already; this runs the model's own loading hooks and its strictness over them.
    set_model_state_dict(model, dict(loaded["model"]))
    return loaded


def _reshard(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # After a forward with no backward the root's parameters are whole, not the optimizer's shards.
            module.reshard()


def _parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Name of each parameter in the bare model; a tied one has its first name."""
    _reshard(model)
    names = {}
    for path, parameter in model.named_parameters():
        owner: Any = model
        bare = []
        for part in path.split("."):
            if part not in _WRAPPER_NAMES and not (
                part == "module" and isinstance(owner, DistributedDataParallel)
            ):
                bare.append(part)
            owner = getattr(owner, part)
        names[parameter] = ".".join(bare)
    return names


def _empty_entry(field: str, like: Tensor, parameter: nn.Parameter) -> Tensor:
    if field == "step":  # torch keeps it on the CPU, and moves it on loading where a fused step wants it
        return torch.empty(like.shape, dtype=like.dtype)
    if like.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=like.dtype)
    return torch.empty(like.shape, dtype=like.dtype, device=parameter.device)


def _install(optimizer: torch.optim.Optimizer, entries: Mapping[nn.Parameter, dict[str, Any]]) -> None:
    packed = optimizer.state_dict()
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    numbers = chain.from_iterable(group["params"] for group in packed["param_groups"])
    number_of = dict(zip(parameters, numbers, strict=True))
    packed["state"] = {number_of[parameter]: entry for parameter, entry in entries.items()}
    optimizer.load_state_dict(packed)
    for parameter, entry in entries.items():
        found = optimizer.state[parameter]
        if found.keys() != entry.keys() or ("step" in entry and float(found["step"]) != float(entry["step"])):
            raise RuntimeError("the optimizer did not take the state it was given")
