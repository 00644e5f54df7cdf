"""The data set of token files in the format of nanoGPT: a `.bin` file of consecutive integers without a header."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.windows import TokenWindows
from trainer.errors import ConfigError
from trainer.protocols import Batch, Splits

_DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")


class TokenFile(TokenWindows):
    """Data set of the windows of a memory-mapped token file; only the pages that a batch needs are read.

    Each worker process of a DataLoader maps the file itself, because pickling a memory map would copy the whole file.

    Args:
        path: path of the file.
        context: number of tokens that the model sees, at least 1; a window has one more.
        dtype: numpy's name of the integer type in the file.
        vocab_size: number of token ids; every token of a batch must be below it. None checks nothing.
        key: config key of `path`, for error messages.
        token_bytes: length in bytes of the text of each token, integers `[vocab_size]`; None if it is not available.

    Raises:
        ConfigError: The file is missing, its size is not a multiple of the integer type, or it is too short.
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
        # An empty file cannot be memory-mapped.
        tokens = np.memmap(file, dtype=dtype, mode="r") if size else np.empty(0, dtype)
        super().__init__(tokens, context, self._origin, token_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFile, self._arguments

    def _check(self, batch: Batch) -> None:
        # On a GPU, a token outside the vocabulary would end in an assertion that does not name the cause.
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
    """Load two token files, one per split.

    Args:
        train_path: `.bin` file of the training split.
        eval_path: `.bin` file of the evaluation split.
        context: number of tokens that the model sees, at least 1; a window has one more.
        dtype: integer type in the files: `uint8`, `uint16` (nanoGPT), `uint32`, `int32` or `int64`.
        vocab_size: number of token ids; every token of a batch must be below it. None takes the length of
            `token_bytes`; if that is None too, tokens are not checked.
        token_bytes: `.npy` file of integers: the number of bytes of the text of each token. With it, evaluations also
            give bits per byte.

    Raises:
        ConfigError: A file is missing or shorter than one window, or an argument is out of range.
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
        raise ConfigError(f"data.token_bytes: {path} has other contents, {expected}")
    if len(lengths) < at_least or (lengths < 0).any():
        raise ConfigError(
            f"data.token_bytes: {path} has {len(lengths)} integers, or some of them are below 0, {expected}"
        )
    return lengths
