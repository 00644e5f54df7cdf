"""Map token files to memory, and find what cannot be right in them before a run begins."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.npy import is_npy, map_npy
from trainer.errors import ConfigError, blamed_on

LARGEST_VOCABULARY = 2**24
"""Tokens from here on are refused whatever the model: no vocabulary is so large, so the dtype is wrong."""

TOKEN_BYTES = "token_bytes.npy"
"""Name of the file of the command `tokenize` with the number of bytes of each token."""

_OTHER_FORMATS = {
    b"PK\x03\x04": "a .zip, .npz or .pt file",
    b"\x1f\x8b\x08": "a .gz file",
    b"\x28\xb5\x2f\xfd": "a .zst file",
    b"\x89HDF\r\n": "an HDF5 file",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    np.array([20240520, 1], "<i4").tobytes(): "a file of llm.c with a header of 1,024 bytes",
    np.array([20240801, 7], "<i4").tobytes(): "a file of llm.c with a header of 1,024 bytes",
}
"""Format by the first bytes of a file that are no tokens."""
_LONGEST_MAGIC = max(map(len, _OTHER_FORMATS))

_CHUNK, _ROW, _COLUMNS = 2**22, 2**13, 8
_SMALL_WORD = 15
"""Largest upper half of a token of twice the width; with words of 16 bits, of a vocabulary of 1,048,576 tokens."""
_ENOUGH = 64
"""Smallest number of tokens of which every second one is 0 by no chance, even with a vocabulary of two tokens."""
_MANY = 10_000
"""Number of tokens among which one has a large lower part, if their vocabulary needs an upper part."""
_BY_WIDTH = {2: "uint16", 4: "uint32", 8: "int64"}


def map_tokens(path: str, dtype: str, origin: str) -> npt.NDArray[Any]:
    """Map the tokens of a file, integers `[length]`, read-only.

    Args:
        path: `.npy` file of integers `[length]`, which any name may have; or raw integers, without a header.
        dtype: numpy's name of the raw integers.
        origin: key and path, for errors.

    Raises:
        ConfigError: the file is missing, of another format, or does not hold whole integers.
    """
    if not os.path.isfile(path):
        raise ConfigError(f"{origin} is not a file")
    with blamed_on(origin):
        if is_npy(path):
            return _map_npy(path, origin)
        _refuse_other_formats(path, origin)
        size = os.path.getsize(path)
        if size % np.dtype(dtype).itemsize:
            raise ConfigError(f"{origin}: {size} bytes are not a whole number of data.dtype = {dtype}")
        # An empty file cannot be mapped.
        return np.memmap(path, dtype=dtype, mode="r") if size else np.empty(0, dtype)


def _map_npy(path: str, origin: str) -> npt.NDArray[Any]:
    tokens = map_npy(path)
    if tokens.dtype.kind not in "iu" or tokens.ndim != 1:
        have = f"{tokens.dtype} of shape {tokens.shape}"
        raise ConfigError(f"{origin} is a .npy file of {have}, expected integers of one dimension")
    return tokens


def _refuse_other_formats(path: str, origin: str) -> None:
    with open(path, "rb") as file:
        first = file.read(_LONGEST_MAGIC)
    for magic, name in _OTHER_FORMATS.items():
        if first.startswith(magic):
            raise ConfigError(f"{origin} is {name}, expected raw integers without a header, or a .npy file")


@dataclass(frozen=True)
class Token:
    """A token of a file and its position, from 0."""

    value: int
    position: int

    def __str__(self) -> str:
        return f"the token {self.value} at position {self.position}"


def check_tokens(tokens: npt.NDArray[Any], origin: str, *, raw: bool, below: int) -> Token:
    """Read all tokens once, and return the largest.

    Args:
        tokens: integers `[length]`, at least one.
        origin: key and path, for errors.
        raw: whether the dtype of the tokens is only assumed (`data.dtype`).
        below: size of the vocabulary.

    Raises:
        ConfigError: the tokens look like integers of another width, or one is negative or not below `below`.
    """
    smallest, largest, columns = _extremes(tokens)
    dtype = tokens.dtype
    if raw and (wider := _wider_dtype(columns, dtype.itemsize, len(tokens))):
        raise ConfigError(
            f"data.dtype: {origin} looks like {wider}, not {dtype}: the upper part of every {wider} is"
            f" {_SMALL_WORD} or less; set data.dtype={wider} (or give a .npy file, which has its dtype in it)"
        )
    if raw and max(largest.value, -smallest.value) >= LARGEST_VOCABULARY:
        token = smallest if smallest.value < 0 else largest
        raise ConfigError(
            f"data.dtype: {origin}, read as {dtype}, has {token}, expected the dtype of the file"
        )
    for token in (smallest, largest):
        if not 0 <= token.value < below:
            raise ConfigError(f"data.vocab_size: {origin} has {token}, expected 0 to {below - 1}")
    return largest


def _extremes(tokens: npt.NDArray[Any]) -> tuple[Token, Token, npt.NDArray[Any]]:
    """Return the smallest and the largest token, and the largest of the positions with each remainder modulo 8."""
    smallest = largest = Token(int(tokens[0]), 0)
    columns = np.zeros(_ROW, tokens.dtype)
    for first in range(0, len(tokens), _CHUNK):
        chunk = tokens[first : first + _CHUNK]
        whole = len(chunk) // _ROW * _ROW
        tops = chunk[:whole].reshape(-1, _ROW).max(0, initial=0)
        tops[: len(chunk) - whole] = np.maximum(tops[: len(chunk) - whole], chunk[whole:])
        columns = np.maximum(columns, tops)
        if tops.max() > largest.value:
            at = int(chunk.argmax())
            largest = Token(int(chunk[at]), first + at)
        if tokens.dtype.kind == "i" and chunk.min() < smallest.value:
            at = int(chunk.argmin())
            smallest = Token(int(chunk[at]), first + at)
    return smallest, largest, columns.reshape(-1, _COLUMNS).max(0)


def _wider_dtype(columns: npt.NDArray[Any], width: int, length: int) -> str | None:
    """Return the dtype of which the tokens look like parts; None if they look like whole tokens.

    The upper part of a wider little-endian integer comes after the lower one, and is small for any vocabulary. So is
    the second number of each pair of a token and a small number. But where upper parts are not 0, the vocabulary is
    larger than all lower parts, so some of these are near the top of their range.
    """
    top = 0.9 * 2 ** (8 * width)
    for parts in (8, 4, 2):
        if width * parts > 8 or length % parts:
            continue
        is_upper = np.arange(_COLUMNS) % parts >= parts // 2
        upper, lower = columns[is_upper].max(), columns[~is_upper].max()
        pairs = upper > 0 and lower < top and length >= _MANY
        if (upper <= _SMALL_WORD < lower and not pairs) or (upper == 0 < lower and length >= _ENOUGH):
            return _BY_WIDTH[width * parts]
    return None
