"""Write a safetensors file tensor by tensor, so that only parts of one tensor are in memory."""

import json
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from trainer.errors import ConfigError
from trainer.weights.safetensors_files import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""Name of each type in the header of a safetensors file."""


def in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names in the order of the file: each tensor begins at a multiple of its element's size."""
    return sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)


def write_file(
    path: Path,
    tensors: Mapping[str, Tensor],
    values: Callable[[str], Iterator[Tensor]],
    metadata: Mapping[str, str],
    *,
    key: str,
) -> None:
    """Write a new file.

    Args:
        path: file to make.
        tensors: meta tensor of each tensor, by name.
        values: function that yields the parts of a tensor by its name, in the order of its elements.
        metadata: further facts for the header.
        key: argument of the command that names the file.

    Raises:
        ConfigError: The file cannot be written; names the key.
    """
    names = in_order(tensors)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    what = f"{key}: {path.name}"
    with path.open("xb", buffering=0) as file:  # a buffer would be written at the end, outside of `_put`
        _put(what, file, len(text).to_bytes(8, "little") + text)
        for name in names:
            for part in values(name):
                _put(what, file, part.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _put(what: str, file: FileIO, content: bytes | memoryview) -> None:
    rest = memoryview(content)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise ConfigError(f"{what} cannot be written: {error.strerror}") from error
