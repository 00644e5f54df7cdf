"""The weighted sum of checkpoints, tensor by tensor and part by part, written as safetensors with its provenance.

The sum is taken in float64 and rounded once to the stored dtype. A part that is the same in every checkpoint is copied
bit for bit. Integer and boolean tensors are those of the newest checkpoint.
"""

import filecmp
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ema.memory import same_bits
from launch.exporting.files import index_name, index_text, split, written_line
from launch.merging.coefficients import coefficients_of
from launch.merging.options import Options
from launch.merging.sources import Reader, open_reader
from launch.merging.writing import NAMES, write_file
from trainer.errors import ConfigError, listed
from trainer.rundir.circumstances import versions
from trainer.rundir.files import write_atomically
from trainer.weights.opening import STEMS
from trainer.weights.source import Region, sha256_of_files

PART = 1 << 22
"""Largest number of elements of a tensor that are in memory at a time, if a checkpoint is read in parts."""
CONFIGS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "*processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
)
"""Files of a folder that `from_pretrained` needs beside the weights."""
RENAMED = {"pytorch_model": "model"}
"""File name, without suffix, that a library gives to safetensors, by that of its files of `torch.save`."""


def opened(options: Options) -> list[Reader]:
    """Open the sources and check that their tensors agree.

    Raises:
        ConfigError: A source cannot be read, a name, shape or dtype differs, or the result cannot have a dtype; names
            the first.
    """
    readers = [open_reader(snapshot) for snapshot in options.snapshots]
    *others, newest = readers
    for name, tensor in newest.tensors.items():
        if tensor.dtype not in NAMES:
            expected = ", ".join(map(_described, NAMES))
            raise ConfigError(
                f"{newest.snapshot.text}: {name} has dtype {_described(tensor.dtype)}; expected one of {expected}"
            )
    for reader in others:
        _check_agreement(reader, newest)
    return readers


def merge(options: Options, readers: Sequence[Reader]) -> list[str]:
    """Write the weighted sum of the sources; return the lines of the summary for the user.

    Raises:
        ConfigError: A source cannot be read or was changed since it was opened, a sum is not finite, or the output
            cannot be written. No file is left.
    """
    newest = readers[-1]
    steps = [reader.snapshot.step or 0 for reader in readers]
    notes: list[str] = []
    values = options.coefficients
    if values is None:
        values, notes = coefficients_of(options.profile, steps)
        if len(values) > 1 and not any(values[:-1]):
            notes.append(f"{options.profile}: only the newest checkpoint counts")
    aliases = newest.aliases if all(reader.aliases == newest.aliases for reader in readers) else {}
    tensors = {name: tensor for name, tensor in newest.tensors.items() if name not in aliases}
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    stem = options.out.stem(in_folder=_stem(newest))
    files = split(sizes, stem, options.max_shard_bytes)
    options.out.require_free(files)
    facts = {**aliases, **_provenance(options, readers, values), "format": "pt"}
    sums = partial(_sums, readers, values)
    with options.out.written_aside() as aside:
        for file, names in files.items():
            write_file(
                aside / file, {name: tensors[name] for name in names}, sums, facts, key=options.out.key
            )
        for reader in readers:  # else the digests could be those of other files
            reader.check_unchanged()
        if len(files) > 1:
            write_atomically(aside / index_name(stem), index_text(files, sum(sizes.values())))
        if options.out.is_folder:
            notes += _copy_configs(readers, aside)
    return [
        f"merged: {options.profile or 'coefficients as given'}",
        *(f"{x:>10.6f}  {reader.snapshot.text}" for x, reader in zip(values, readers, strict=True)),
        *(f"note: {note}" for note in notes),
        written_line(options.out, sizes, files),
    ]


def _check_agreement(reader: Reader, newest: Reader) -> None:
    """Refuse a source whose tensors differ from those of the newest."""
    here, there = reader.snapshot.text, newest.snapshot.text
    for name in newest.tensors:
        if name not in reader.tensors:
            raise ConfigError(f"{here} has no tensor {name}, which {there} has")
    for name, tensor in reader.tensors.items():
        if name not in newest.tensors:
            raise ConfigError(f"{there} has no tensor {name}, which {here} has")
        other = newest.tensors[name]
        for what in ("shape", "dtype"):
            one, two = (_described(getattr(each, what)) for each in (tensor, other))
            if one != two:
                raise ConfigError(f"{here}: {name} has {what} {one}, and in {there} {two}")


def _described(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value).removeprefix("torch.")


def _sums(readers: Sequence[Reader], values: Sequence[float], name: str) -> Iterator[Tensor]:
    """Yield the parts of a merged tensor, in the order of its elements."""
    newest = readers[-1]
    like = newest.tensors[name]
    wide = torch.complex128 if like.is_complex() else torch.float64
    used = [(reader, x) for reader, x in zip(readers, values, strict=True) if x or reader is newest]
    in_parts = all(reader.in_parts for reader in readers)
    for region in _regions(like.shape, PART if in_parts else like.numel()):
        last = newest.read(name, region)
        if not (like.is_floating_point() or like.is_complex()):
            yield last
            continue
        total, same = last.to(wide, copy=True).mul_(values[-1]), True
        for reader, x in used[:-1]:
            part = reader.read(name, region)
            same = same and same_bits(part, last)
            total.add_(part.to(wide), alpha=x)
        rounded = last if same else total.to(like.dtype)
        if not same and not rounded.isfinite().all():
            raise ConfigError(_not_finite(name, region, [reader for reader, _ in used], total))
        yield rounded


def _regions(shape: Sequence[int], most: int) -> Iterator[Region]:
    """Yield parts of a tensor with at most `most` elements each, in the order of its elements."""
    size = math.prod(shape)
    if size <= most:
        if size:
            yield tuple(slice(0, length) for length in shape)
        return
    length, *inner = shape
    rows = max(1, most * length // size)
    for begin in range(0, length, rows):
        outer = slice(begin, min(begin + rows, length))
        yield from ((outer, *rest) for rest in _regions(inner, most))


def _not_finite(name: str, region: Region, readers: Sequence[Reader], total: Tensor) -> str:
    for reader in readers:
        if not reader.read(name, region).isfinite().all():
            return f"{reader.snapshot.text}: {name} has a value that is not finite"
    return f"{name}: the sum has the value {total.abs().max().item():.3g}, too large for the dtype of the checkpoints"


def _stem(newest: Reader) -> str:
    """Return the file name, without suffix, that the library of the newest checkpoint uses in a folder."""
    names = [file.name for file in newest.files]
    stem = next((stem for stem in STEMS if all(name.startswith(stem) for name in names)), "model")
    return RENAMED.get(stem, stem)


def _provenance(options: Options, readers: Sequence[Reader], values: Sequence[float]) -> dict[str, str]:
    sources = [
        {
            "path": str(reader.snapshot.path.absolute()),
            "weights": reader.snapshot.name,
            "step": reader.snapshot.step,
            "coefficient": x,
            "sha256": sha256_of_files(reader.files, reader.files[0].absolute().parent),
        }
        for reader, x in zip(readers, values, strict=True)
    ]
    merged = {"profile": options.profile or None, "sources": sources, "versions": versions()}
    return {"merge": json.dumps(merged)}


def _copy_configs(readers: Sequence[Reader], folder: Path) -> list[str]:
    """Copy the files that `from_pretrained` needs from the newest source; return a note if others differ."""
    own = _configs(readers[-1])
    for name, path in own.items():
        shutil.copyfile(path, folder / name)
    others = [_configs(reader) for reader in readers[:-1]]
    differing = [
        name
        for name in own
        if any(name in one and not filecmp.cmp(one[name], own[name], shallow=False) for one in others)
    ]
    if not differing:
        return []
    return [f"{listed(differing)} of the newest checkpoint is copied; in other checkpoints it differs"]


def _configs(reader: Reader) -> Mapping[str, Path]:
    path = reader.snapshot.path
    files = sorted(path.iterdir()) if path.is_dir() else []
    return {
        file.name: file
        for file in files
        if file.is_file() and any(fnmatchcase(file.name, pattern) for pattern in CONFIGS)
    }
