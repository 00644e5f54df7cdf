"""Export of a model of peft: its adapters alone, as a folder of peft, or merged into the weights of the base model.

peft is imported only for a run whose model needs it.
"""

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError, blamed_on, listed
from trainer.weights.run_directory import MODEL

KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""Values of peft's `init_lora_weights` that leave the base model as it is; others move parts of it to the adapters."""


def adapter_names(model: Any) -> dict[str, str]:
    """Return the tensors of a model's adapter folder: name in its file -> name in the model's state dict.

    Raises:
        ConfigError: The adapters alone do not give the model of the run on the original base.
    """
    from peft import get_peft_model_state_dict

    adapter, config = _only_adapter(model)
    if (start := getattr(config, "init_lora_weights", True)) not in KEEPS_BASE:
        raise ConfigError(
            f"merged: init_lora_weights={start} has changed the base model, so the adapters do not fit the original;"
            " expected merged=true"
        )
    if config.is_prompt_learning:
        raise ConfigError(
            f"merged: an adapter folder of {config.peft_type.value} holds prompts that peft computes from the weights;"
            " expected out=FILE.safetensors"
        )
    state = model.state_dict(keep_vars=True)
    names = {id(tensor): name for name, tensor in reversed(state.items())}
    # Without embedding layers: "auto" would look for the base model in the network, and they are frozen.
    chosen = get_peft_model_state_dict(
        model, state_dict=state, adapter_name=adapter, save_embedding_layers=False
    )
    found = {name: names[id(tensor)] for name, tensor in chosen.items()}
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    left = [names[one] for one in trained - {id(tensor) for tensor in chosen.values()}]
    if left:
        raise ConfigError(
            f"merged: an adapter folder of peft cannot hold {listed(sorted(left))}, which the run trains;"
            " expected merged=true or out=FILE.safetensors"
        )
    return found


def write_adapter_config(model: Any, folder: Path) -> None:
    """Write `adapter_config.json`, which `PeftModel.from_pretrained` needs in addition to the weights."""
    _, config = _only_adapter(model)
    config = copy.copy(config)
    config.inference_mode = True
    if config.base_model_name_or_path and os.path.isdir(config.base_model_name_or_path):
        # From another folder, a relative path would be the name of a model to download.
        config.base_model_name_or_path = os.path.abspath(config.base_model_name_or_path)
    base = type(model.get_base_model())
    # peft writes so which class it finds the base by, where no task does.
    mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
    config.save_pretrained(str(folder), auto_mapping_dict=None if config.task_type else mapping)


def merge(
    model: Any, state: Mapping[str, Tensor], tied: Mapping[str, str]
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Merge the adapters into the base model.

    Args:
        model: Model of peft, on any device; it is used up.
        state: Its tensors by name, on the CPU, without tied names.
        tied: Tied names, each with the name in `state` of the same tensor.

    Returns:
        The base model with merged weights, and these by their keys as in a checkpoint.

    Raises:
        ConfigError: The method of peft cannot be merged, or the base class ties what the adapters made different.
    """
    # Tied tensors are separate at first: an adapter may change one of them.
    whole = {**state, **{name: state[kept].clone() for name, kept in tied.items()}}
    model.load_state_dict(whole, assign=True)
    before = model.state_dict(keep_vars=True)
    # It is None if the base model is not of transformers.
    ties = getattr(getattr(model.get_base_model(), "config", None), "tie_word_embeddings", None)
    with blamed_on("merged"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*no longer tied")  # they are tied again below
        if not callable(getattr(model, "merge_and_unload", None)):
            raise ConfigError(
                f"merged: {_only_adapter(model)[1].peft_type} cannot be merged into the base model"
            )
        merged: nn.Module = model.merge_and_unload(safe_merge=True)
    separate = _tie_again(merged, [(before[name], before[kept]) for name, kept in tied.items()])
    if separate and ties is None:
        raise ConfigError(
            f"merged: {type(merged).__name__} ties {separate}, and the adapters change one of its names"
        )
    if ties is not None:
        merged.config.tie_word_embeddings = ties and not separate  # type: ignore[union-attr]
    return merged, {f"{MODEL}{name}": tensor.detach() for name, tensor in merged.state_dict().items()}


def _tie_again(merged: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]]) -> str | None:
    """Tie the pairs of tensors that are still equal; return the name of one that is not, or None."""
    names = {id(tensor): name for name, tensor in merged.state_dict(keep_vars=True).items()}
    separate = None
    for one, other in pairs:
        name, kept = names.get(id(one)), names.get(id(other))
        if name and kept and torch.equal(one, other):
            merged.load_state_dict({name: other}, strict=False, assign=True)
        else:
            separate = name or kept or separate
    return separate


def _only_adapter(model: Any) -> tuple[str, Any]:
    """Return the name and the configuration of the only adapter; refuse several."""
    if len(model.peft_config) != 1:
        raise ConfigError(f"model: expected one adapter, got {listed(list(model.peft_config))}")
    return next(iter(model.peft_config.items()))
