"""Export of the weights in a checkpoint to safetensors files, with the tensor names of the model's plain class.

Tensors are read one after another: only the tensors of one file, and the tensor that is being read, are in memory. The
model is built on the meta device from the frozen configuration, only to learn which tensor names it expects and which
of these names are the same tensor.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ema.memory import same_bits
from ema.rules import path_of
from ema.state import COUNTERS, RULE
from launch.exporting.adapters import adapter_names, merge, write_adapter_config
from launch.exporting.files import index_name, index_text, split, written_line
from launch.exporting.loading import (
    STEMS,
    base_node,
    declared_ties,
    library_of,
    python_lines,
    write_config,
)
from launch.exporting.options import Options
from trainer.checkpoint.store import TensorReader, stored_tensors
from trainer.checkpoint.training_state import BATCHNORM
from trainer.config.compose import to_config
from trainer.config.frozen import thaw
from trainer.config.own_code import EXPORTED, refuse_untrusted
from trainer.config.targets import instantiate
from trainer.errors import ConfigError
from trainer.rundir.directory import FORK, ORIGIN, RunDir
from trainer.rundir.files import write_atomically
from trainer.rundir.keys import AVERAGE, LIVE
from trainer.weights.run_directory import keys_by_name, started_counters
from trainer.weights.selection import choose_checkpoint, choose_one


@dataclass(frozen=True)
class Source:
    """Origin of one tensor of the export."""

    keys: list[str]
    """Keys in the checkpoint of the tensor and of the names tied to it; all must have the same values."""
    shape: torch.Size
    dtype: torch.dtype
    """Type in the export."""


@dataclass(frozen=True)
class Contents:
    """Tensors of an export."""

    sources: dict[str, Source]
    """Origin of each exported tensor by name, in the order of the model's state dict."""
    tied: dict[str, str]
    """Tied names that are not exported, each with the name under which the same tensor is exported."""

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each exported tensor by name."""
        return {name: one.shape.numel() * one.dtype.itemsize for name, one in self.sources.items()}

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Distinct types of the exported tensors, in the order of the tensors."""
        return list(dict.fromkeys(source.dtype for source in self.sources.values()))


def export(options: Options) -> list[str]:
    """Export the weights that the options name; return the lines of the summary for the user.

    Raises:
        ConfigError: An option is invalid, or a file cannot be read or written. No file of the export is left.
    """
    run_dir = options.run_dir
    chosen = choose_checkpoint(run_dir, options.step, [options.weights])
    checkpoint, step = chosen.path, chosen.step
    reader = TensorReader(checkpoint)
    weights = choose_one(chosen.patterns[0], chosen.averages)
    average = None if weights == LIVE else weights.removeprefix(AVERAGE)
    history = {} if average is None else _history(reader, step, average)
    config = to_config(thaw(run_dir.latest_config()))
    refuse_untrusted(config, options.allowed, EXPORTED)
    model = build_plain(config.model, options.allowed)
    part = _chosen_part(options, config.model, model, average, checkpoint, reader)
    contents = part.contents
    facts = {**contents.tied, **_facts(run_dir, step, weights, config.model), **history, "format": "pt"}
    files = _write(options, part, facts)
    notes = [chosen.note] if chosen.note else []
    if average and not options.merged:
        notes += _notes(part, config.ema.batchnorm_batches)
    dtypes = ", ".join(str(one).removeprefix("torch.") for one in contents.dtypes)
    python = python_lines(part.node, part.model, options.out, files, contents.tied)
    return [
        f"exported: {weights} of {run_dir.path} at step {step}",
        *(f"note: {note}" for note in notes),
        written_line(options.out, contents.sizes, files, f", {dtypes}"),
        "load it with:",
        *(f"  {line}" for line in python),
    ]


@dataclass(frozen=True)
class _Part:
    """What an export contains: the model of the run, its adapters, or the base model with merged adapters."""

    model: nn.Module
    node: Mapping[str, Any] | None
    """Configuration that builds the model, or the base model of adapters; None if the run's has no part for that."""
    contents: Contents
    read: Callable[[str], Tensor]
    """Function that returns a tensor by its key."""
    adapters: bool = False
    """Whether these are only the adapters, in the files of peft."""


def _chosen_part(
    options: Options,
    node: Mapping[str, Any],
    model: nn.Module,
    average: str | None,
    checkpoint: Path,
    reader: TensorReader,
) -> _Part:
    dtype = None if options.dtype == "stored" else getattr(torch, options.dtype)
    is_adapted = library_of(model) == "peft"
    if options.merged and not is_adapted:
        raise ConfigError(f"merged: expected a model of peft, the run has a {type(model).__name__}")
    # Adapters are merged in the stored precision or a higher one; a lower one is the last step.
    first = dtype if not options.merged or dtype == torch.float32 else None
    contents = match_names(model, stored_tensors(checkpoint), average, first, checkpoint)
    if options.merged:
        state = {name: _fetch(reader.read, name, source) for name, source in contents.sources.items()}
        base, merged = merge(model, state, contents.tied)
        contents = match_names(base, merged, None, dtype, checkpoint)
        return _Part(base, base_node(node), contents, merged.__getitem__)
    if not (is_adapted and options.out.is_folder):
        return _Part(model, node, contents, reader.read)
    sources = {
        name: contents.sources[contents.tied.get(own, own)] for name, own in adapter_names(model).items()
    }
    return _Part(model, base_node(node), Contents(sources, {}), reader.read, adapters=True)


def _write(options: Options, part: _Part, facts: Mapping[str, str]) -> list[str]:
    """Write all files of an export; return the names of its safetensors files."""
    library, contents = library_of(part.model), part.contents
    stem = options.out.stem(in_folder=STEMS.get(library or "", "model"))
    sizes = contents.sizes
    # peft reads adapters from one file only.
    files = split(sizes, stem, sum(sizes.values()) if part.adapters else options.max_shard_bytes)
    options.out.require_free(files)
    with options.out.written_aside() as aside:
        for file, names in files.items():
            _write_file(part.read, {name: contents.sources[name] for name in names}, aside / file, facts)
        if len(files) > 1:
            write_atomically(aside / index_name(stem), index_text(files, sum(sizes.values())))
        if part.adapters:
            write_adapter_config(part.model, aside)
        elif options.out.is_folder and library:
            floating = [one for one in contents.dtypes if one.is_floating_point]
            write_config(part.model, library, aside, str(floating[0]).removeprefix("torch."))
    return list(files)


def _history(reader: TensorReader, step: int, average: str) -> dict[str, str]:
    """Return the rule, the settings and the number of updates of an average, for the metadata of the files."""
    counters, fields = started_counters(reader.read, step, average)
    return {
        "rule": path_of(fields["rule"]) if fields.get("rule") else str(fields.get("type")),
        "decay": str(fields.get("decay")),
        "start_iter": str(fields.get("start_iter")),
        "updates": str(counters.num_updates),
        "rule_fields": json.dumps(fields),
    }


def _facts(run_dir: RunDir, step: int, weights: str, model: Mapping[str, Any]) -> dict[str, str]:
    meta = run_dir.meta
    versions, git = meta.get("versions"), meta.get("git")
    facts = {
        "weights": weights,
        "step": step,
        "run": run_dir.path.resolve().name,
        "model": json.dumps(model),
        "config_sha256": meta["config_sha256"],
        "git_commit": git.get("commit") if isinstance(git, dict) else None,
        "git_dirty": git.get("dirty") if isinstance(git, dict) else None,
        **{key: json.dumps(meta[key]) if key in meta else None for key in (ORIGIN, FORK)},
        "polyak_version": versions.get("polyak") if isinstance(versions, dict) else None,
    }
    return {name: str(value) for name, value in facts.items() if value is not None}


def build_plain(node: Mapping[str, Any], allowed: Sequence[str]) -> nn.Module:
    """Return the model as its class builds it, on the meta device if its constructor supports that.

    Raises:
        ConfigError: See `trainer.config.targets.instantiate`.
    """
    try:
        with torch.device("meta"):
            return instantiate(node, group="model", allowed=allowed)
    except Exception:
        # Constructors that compute with the values of tensors fail on meta. All other errors are raised again here.
        return instantiate(node, group="model", allowed=allowed)


def match_names(
    model: nn.Module,
    stored: Mapping[str, Tensor],
    average: str | None,
    dtype: torch.dtype | None,
    checkpoint: Path,
) -> Contents:
    """Find the checkpoint's tensor for each tensor of the model; tied names share one.

    Args:
        model: Model of the plain class, on any device.
        stored: Tensors of the checkpoint by key, on the meta device.
        average: Name of the average, or None for the live weights. Tensors that it does not track have live values.
        dtype: Type of floating-point tensors in the export; None keeps the stored types.
        checkpoint: Path of the checkpoint, for messages.

    Raises:
        ConfigError: A tensor is missing in the checkpoint or in the model, or its shapes differ.
    """
    groups: dict[int, list[str]] = {}
    wanted = model.state_dict(keep_vars=True)
    for name, value in wanted.items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"model: {name} is a {type(value).__name__}, but safetensors files contain only tensors"
            )
        groups.setdefault(id(value), []).append(name)
    discarded = declared_ties(model)
    keys_of = keys_by_name(wanted, average, stored)
    sources: dict[str, Source] = {}
    tied: dict[str, str] = {}
    for names in groups.values():
        keys = [keys_of[name][0] for name in names if name in keys_of]
        if not keys:
            raise ConfigError(
                f"{checkpoint}: expected model/{names[0]}, a tensor of {type(model).__name__}; it is missing"
            )
        # Of tied names, safetensors.torch.save_model keeps the first by name. But from_pretrained needs the name to
        # which it ties the others.
        kept = min(names, key=lambda name: (name in discarded, name))
        like = stored[keys[0]]
        if like.shape != wanted[kept].shape:
            raise ConfigError(
                f"{checkpoint}: {keys[0]} has shape {tuple(like.shape)},"
                f" but {type(model).__name__} has {tuple(wanted[kept].shape)}"
            )
        cast_to = dtype if dtype is not None and like.is_floating_point() else like.dtype
        sources[kept] = Source(keys, like.shape, cast_to)
        tied |= {name: kept for name in names if name != kept}
    _refuse_unused(stored, {key for keys in keys_of.values() for key in keys}, average, checkpoint)
    return Contents(sources, tied)


def _refuse_unused(
    stored: Collection[str], used: Collection[str], average: str | None, checkpoint: Path
) -> None:
    """Check that the model has every stored tensor of these weights.

    Otherwise, a model that renames its tensors when it saves them would silently get live values instead of averages.
    """
    prefixes = ("model/",) if average is None else (f"ema/{average}/", f"{BATCHNORM}/{average}/")
    reserved = {f"ema/{average}/{COUNTERS}", f"ema/{average}/{RULE}"}
    unused = [key for key in stored if key.startswith(prefixes) and key not in used and key not in reserved]
    if unused:
        raise ConfigError(f"{checkpoint} has {unused[0]}, but the model of config.yaml has no such tensor")


def _write_file(
    read: Callable[[str], Tensor], sources: Mapping[str, Source], path: Path, facts: Mapping[str, str]
) -> None:
    # A function of its own, so that its tensors are freed before those of the next file are read.
    tensors = {name: _fetch(read, name, source) for name, source in sources.items()}
    try:
        save_file(tensors, path, metadata=dict(facts))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"out: {path.name} cannot be written: {error}") from error


def _fetch(read: Callable[[str], Tensor], name: str, source: Source) -> Tensor:
    first, *others = source.keys
    tensor = read(first)
    for other in others:
        if not same_bits(tensor, read(other)):
            raise ConfigError(
                f"model: {first} and {other} are one tensor in the class but differ in the checkpoint; the run must"
                " have untied them"
            )
    cast = tensor.to(source.dtype)
    if cast is not tensor and not cast.isfinite().all() and tensor.isfinite().all():
        raise ConfigError(
            f"dtype: {name} has the value {tensor.abs().max().item():.3g}, too large for"
            f" {str(source.dtype).removeprefix('torch.')}; expected bfloat16 or float32"
        )
    return cast


def _notes(part: _Part, batchnorm_batches: int) -> list[str]:
    """Return notes on exported tensors whose values a user of averages may not expect."""
    model, contents = part.model, part.contents
    notes = []
    live = [source for source in contents.sources.values() if source.keys[0].startswith("model/")]
    if live:
        notes.append(f"{len(live)} of {len(contents.sources)} tensors are not averaged and have live values")
    stored = any(key.startswith(f"{BATCHNORM}/") for one in contents.sources.values() for key in one.keys)
    has_batchnorm = any(isinstance(module, _BatchNorm) for module in model.modules())
    if part.adapters and has_batchnorm:
        notes.append(
            "the adapters do not contain the BatchNorm statistics of the run; merged=true exports them too"
        )
    elif batchnorm_batches and has_batchnorm and not stored:  # checkpoints of earlier versions
        notes.append(
            "BatchNorm statistics are exported as the average keeps them, but its evaluations re-estimated them"
            f" (ema.batchnorm_batches={batchnorm_batches})"
        )
    return notes
