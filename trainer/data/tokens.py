"""Token files as nanoGPT writes them: raw integers in a `.bin` file, one after another, without a header."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.windows import TokenWindows
from trainer.errors import ConfigError
from trainer.protocols import Batch, Splits

_DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")


class TokenFile(TokenWindows):
    """Windows of a memory-mapped file; only the pages that a batch touches are read.

    A DataLoader worker maps the file again: pickling a memory map would copy all of it.

    Args:
        path: the file.
        context: tokens a model sees; a window has one more.
        dtype: numpy's name of the integers in the file.
        vocab_size: tokens must be below it; None checks nothing.
        key: config key of `path`, for errors.
        token_bytes: length of the text of each token, integers `[vocab_size]`; None if unknown.

    Raises:
        ConfigError: the file is missing, does not hold whole integers, or is shorter than one window.
    """

    def __init__(
        self,
        path: str,
        context: int,
        dtype: str,
        vocab_size: int | None,
        key: str,
        token_bytes: npt.NDArray[Any] | None = None,
    ) -> None:
        self._arguments = (path, context, dtype, vocab_size, key, token_bytes)
        self._origin, self._vocab_size = f"{key}: {path}", vocab_size
        file = Path(path)
        if not file.is_file():
            raise ConfigError(f"{self._origin} is not a file")
        size = file.stat().st_size
        if size % np.dtype(dtype).itemsize:
            raise ConfigError(f"{self._origin}: {size} bytes are not a whole number of data.dtype = {dtype}")
        # An empty file cannot be mapped.
        tokens = np.memmap(file, dtype=dtype, mode="r") if size else np.empty(0, dtype)
        super().__init__(tokens, context, self._origin, token_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFile, self._arguments

    def _check(self, batch: Batch) -> None:
        # On a GPU, a token outside the vocabulary would end in an assertion without a name.
        if self._vocab_size is not None:
            low, high = batch["tokens"].aminmax()
            if low < 0 or high >= self._vocab_size:
                raise ConfigError(
                    f"data.vocab_size: {self._origin} has the token {int(low if low < 0 else high)},"
                    f" expected 0 to {self._vocab_size - 1}"
                )


def tokens(
    train_path: str,
    eval_path: str,
    context: int = 1024,
    dtype: str = "uint16",
    vocab_size: int | None = None,
    token_bytes: str | None = None,
) -> Splits:
    """Two token files, one per split.

    Args:
        train_path: `.bin` file to train on.
        eval_path: `.bin` file to evaluate on.
        context: tokens a model sees; a window has one more.
        dtype: integers in the files: `uint8`, `uint16` (nanoGPT), `uint32`, `int32` or `int64`.
        vocab_size: every token of a batch is checked to be below it; None checks nothing.
        token_bytes: `.npy` file of integers, the number of bytes of text of each token; evaluations then give bits
            per byte. None gives none. Without `vocab_size`, its length is the vocabulary.

    Raises:
        ConfigError: a file is missing or shorter than one window, or an argument is out of range.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"data.dtype: {dtype} is not one of {', '.join(_DTYPES)}")
    lengths = None if token_bytes is None else _read_token_bytes(token_bytes, vocab_size or 1)
    if lengths is not None and vocab_size is None:
        vocab_size = len(lengths)
    facts = {"context": context} | ({} if vocab_size is None else {"vocab_size": vocab_size})
    return Splits(
        TokenFile(train_path, context, dtype, vocab_size, "data.train_path", lengths),
        TokenFile(eval_path, context, dtype, vocab_size, "data.eval_path", lengths),
        facts,
    )


def _read_token_bytes(path: str, at_least: int) -> npt.NDArray[Any]:
    expected = f"expected a .npy file of at least {at_least} integers of 0 or more"
    try:
        lengths = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"data.token_bytes: {path} cannot be read ({error}), {expected}") from error
    if not isinstance(lengths, np.ndarray) or lengths.dtype.kind not in "iu" or lengths.ndim != 1:
        raise ConfigError(f"data.token_bytes: {path} has something else, {expected}")
    if len(lengths) < at_least or (lengths < 0).any():
        raise ConfigError(f"data.token_bytes: {path} has {len(lengths)}, or some below 0, {expected}")
    return lengths
