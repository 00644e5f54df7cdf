"""Collect and load weights, buffers and optimizer state as a nested dict, by the names of the unwrapped model."""

from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from ema import is_swapped
from trainer.checkpoint.format import CheckpointMisfit
from trainer.checkpoint.store import load_checkpoint, stored_scalars, stored_tensors
from trainer.distributed.processes import agreeing
from trainer.distributed.sharding import parameter_names, reshard
from trainer.errors import ConfigError
from trainer.optimizers import changed_settings, class_name, parts_of

LOSS_SCALE = "loss_scale"
"""Part of a checkpoint with the state of the loss scaling, if the run computes in float16."""
BATCHNORM = "batchnorm"
"""Part of a checkpoint with the BatchNorm buffers that evaluations estimate again, by name of the average."""
_OPTIMIZER = "optimizer/state/"


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the weights and buffers of a model and the state of its optimizer, by names of the unwrapped model.

    The names have no parts from wrappers (DDP, `torch.compile`, activation checkpointing). Nothing is copied or
    gathered: the tensors are those of the model, and FSDP2 shards are DTensors. Settings of parameter groups (learning
    rates, betas) come from the config and are left out, unless the optimizer itself has changed them.

    torch's `get_optimizer_state_dict` steps a fresh optimizer to make its keys, which sets Adam's step count to 1. This
    function does not, so a checkpoint from before the first step resumes correctly.

    Raises:
        ValueError: The optimizer has a parameter that the model lacks (it was made before sharding).
        RuntimeError: An average is swapped into the model, so its weights would be saved as the live ones.
    """
    if is_swapped(model):
        raise RuntimeError("cannot save the model while an average is swapped into it")
    names = parameter_names(model)
    entries = {}
    state = optimizer.state
    for parameter in chain.from_iterable(group["params"] for group in optimizer.param_groups):
        if parameter not in names:
            raise ValueError("training_state: the optimizer holds a parameter that the model does not have")
        if parameter in state:
            entries[names[parameter]] = dict(state[parameter])
    kind = {"class": class_name(optimizer), "entries": len(entries)}
    beside = {"groups": changed_settings(optimizer), "shared": _shared_state(optimizer)}
    kept = {name: values for name, values in beside.items() if values}
    return {"model": get_model_state_dict(model), "optimizer": {**kind, "state": entries, **kept}}


def _shared_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the entries of the optimizer's state that belong to no parameter; of several, by position."""
    states: list[Mapping[Any, Any]] = [part.state for part in parts_of(optimizer)]
    shared = [{key: value for key, value in state.items() if not isinstance(key, Tensor)} for state in states]
    if len(shared) == 1:
        return shared[0]
    return {str(position): values for position, values in enumerate(shared) if values}


def load_training_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, others: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Load a checkpoint whose state was `{**training_state(model, optimizer), **others}`, in place.

    The optimizer gets the entries that the checkpoint lists, sharded like its parameters, even before its first step.
    The model is built and sharded. `others` are more tensors to overwrite, nested as saved (the averages); JSON values
    may be left out. Returns the result of `load_checkpoint`.

    Raises:
        CheckpointError: A tensor is missing, unexpected or of another shape, or a file is damaged; names it.
        ConfigError: The checkpoint was saved with another class of optimizer.

    Collectives: those of `load_checkpoint`.
    """
    with agreeing("reading the checkpoint's index", Exception):
        scalars, stored = stored_scalars(path), stored_tensors(path)
    kind = scalars.get("optimizer")
    kind = kind if isinstance(kind, dict) else {}
    _check_kind(path, kind, optimizer)
    parameters = {name: parameter for parameter, name in parameter_names(model).items()}
    weights = _weights(path, stored, model)
    entries = _empty_entries(path, stored, parameters)
    beside = _empty_beside(stored, next(iter(parameters.values())).device)
    loaded = _load(path, model, weights, {**(others or {}), "optimizer": {"state": entries, **beside}})
    state = loaded["optimizer"]
    _install(optimizer, {parameters[name]: entry for name, entry in state["state"].items()})
    if len(optimizer.state) != kind.get("entries"):
        raise RuntimeError(
            f"{path}: loaded {len(optimizer.state)} optimizer entries; expected {kind.get('entries')}"
        )
    parts, shared = parts_of(optimizer), state.get("shared", {})
    for position, part in enumerate(parts):
        part.state.update(shared if len(parts) == 1 else shared.get(str(position), {}))
    for position, changed in state.get("groups", {}).items():
        optimizer.param_groups[int(position)].update(changed)
    return loaded


def _check_kind(path: Path, kind: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    if kind.get("class") != class_name(optimizer):
        raise ConfigError(
            f"optimizer: {path} was saved with {kind.get('class')}; got {class_name(optimizer)}"
        )
    if any(int(position) >= len(optimizer.param_groups) for position in kind.get("groups", {})):
        raise ConfigError(f"optimizer: {path} has the state of more parameter groups than this optimizer")


def _empty_entries(
    path: Path, stored: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, Any]]:
    """Return empty tensors for the optimizer's state of each parameter, by the names of parameter and state."""
    entries: dict[str, dict[str, Any]] = {}
    for key, like in stored.items():
        if key.startswith(_OPTIMIZER):
            name, _, field = key.removeprefix(_OPTIMIZER).rpartition("/")
            if name not in parameters:
                raise CheckpointMisfit(f"{path} has {key}, and the model has no such parameter", key)
            entries.setdefault(name, {})[field] = _empty_entry(field, like, parameters[name])
    return entries


def _empty_beside(stored: Mapping[str, Tensor], device: torch.device) -> dict[str, Any]:
    """Return empty tensors for the optimizer's tensors that belong to no parameter, nested as they were saved."""
    empty: dict[str, Any] = {"groups": {}, "shared": {}}
    for key, like in stored.items():
        _, *parents, name = key.split("/")
        if key.startswith(("optimizer/groups/", "optimizer/shared/")):
            inner = empty
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[name] = torch.empty(like.shape, dtype=like.dtype, device=device)
    return empty


def load_weights(path: Path, model: nn.Module, others: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Load the weights and buffers of a checkpoint and the tensors of `others`, without the optimizer.

    Model, result and collectives as for `load_training_state`.

    Raises:
        CheckpointError: A tensor is missing, unexpected or of another shape, or a file is damaged; names it.
    """
    with agreeing("reading the checkpoint's index", Exception):
        stored = stored_tensors(path)
    return _load(path, model, _weights(path, stored, model), others or {})


def _weights(path: Path, stored: Iterable[str], model: nn.Module) -> dict[str, Any]:
    """Return the tensors of the model; refuse a checkpoint that has a model tensor which the model lacks."""
    reshard(model)
    weights = get_model_state_dict(model)
    for key in stored:
        if key.startswith("model/") and key.removeprefix("model/") not in weights:
            raise CheckpointMisfit(f"{path} has {key}, and the model has no such tensor", key)
    return weights


def _load(
    path: Path, model: nn.Module, weights: Mapping[str, Any], others: Mapping[str, Any]
) -> dict[str, Any]:
    # The model first: `resume` then knows that a later misfit has another cause.
    loaded = load_checkpoint(path, {"model": weights, **others})
    # The weights are loaded already; this call runs the loading hooks and the strict check of the model.
    set_model_state_dict(model, dict(loaded["model"]))
    return loaded


def _empty_entry(field: str, like: Tensor, parameter: nn.Parameter) -> Tensor:
    if field == "step":  # on the CPU, as in torch; on loading, torch moves it for a fused step
        return torch.empty(like.shape, dtype=like.dtype)
    if like.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=like.dtype)
    return torch.empty(like.shape, dtype=like.dtype, device=parameter.device)


def _install(optimizer: torch.optim.Optimizer, entries: Mapping[nn.Parameter, dict[str, Any]]) -> None:
    for part in parts_of(optimizer):
        packed = part.state_dict()
        parameters = chain.from_iterable(group["params"] for group in part.param_groups)
        numbers = chain.from_iterable(group["params"] for group in packed["param_groups"])
        pairs = zip(parameters, numbers, strict=True)
        packed["state"] = {number: entries[p] for p, number in pairs if p in entries}
        part.load_state_dict(packed)
    state = optimizer.state
    for parameter, entry in entries.items():
        actual = state.get(parameter, {})
        if actual.keys() != entry.keys() or (
            "step" in entry and float(actual["step"]) != float(entry["step"])
        ):
            raise RuntimeError("the optimizer did not accept the loaded state")
