"""Token files as nanoGPT writes them, raw integers one after another in a `.bin` file; or `.npy` files."""

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.token_files import LARGEST_VOCABULARY, Token, check_tokens, is_npy, map_tokens
from trainer.data.windows import TokenWindows
from trainer.errors import ConfigError
from trainer.protocols import Splits

_DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")


class TokenFile(TokenWindows):
    """Windows of a memory-mapped file; only the pages that a batch touches are read.

    A DataLoader worker maps the file again: pickling a memory map would copy all of it.

    Args:
        path: the file.
        context: tokens a model sees; a window has one more.
        dtype: numpy's name of the integers in a file that is no `.npy` file.
        key: config key of `path`, for errors.
        token_bytes: length of the text of each token, integers `[vocab_size]`; None if unknown.

    Raises:
        ConfigError: the file is missing, does not hold whole integers, or is shorter than one window.
    """

    def __init__(
        self, path: str, context: int, dtype: str, key: str, token_bytes: npt.NDArray[Any] | None = None
    ) -> None:
        self._arguments = (path, context, dtype, key, token_bytes)
        self._path, self._origin = path, f"{key}: {path}"
        super().__init__(map_tokens(path, dtype, self._origin), context, self._origin, token_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFile, self._arguments

    def check(self, below: int) -> tuple[Token, str, list[str]]:
        """Read the whole file once; return its largest token, a clause that names it, and warnings.

        Raises:
            ConfigError: the file looks like integers of another dtype, or a token is not in 0 to `below` - 1.
        """
        npy = is_npy(self._path)
        largest = check_tokens(self._tokens, self._origin, raw=not npy, below=below)
        header = (
            f"{self._origin} is a .npy file: its header's dtype {self._tokens.dtype} is used, not data.dtype"
        )
        return largest, f"{self._origin} has {largest}", [header] if npy else []


def tokens(
    train_path: str,
    eval_path: str,
    context: int = 1024,
    dtype: str = "uint16",
    vocab_size: int | None = None,
    token_bytes: str | None = None,
) -> Splits:
    """Two token files, one per split. Each is read once to check its tokens.

    Args:
        train_path: file to train on: `.bin`, or `.npy` of integers `[length]`.
        eval_path: file to evaluate on.
        context: tokens a model sees; a window has one more.
        dtype: integers in the `.bin` files: `uint8`, `uint16` (nanoGPT), `uint32`, `int32` or `int64`.
        vocab_size: every token must be below it, and the model's vocabulary may not be smaller; None takes the
            largest token.
        token_bytes: `.npy` file of integers, the number of bytes of text of each token; evaluations then give bits
            per byte. None gives none. Without `vocab_size`, its length is the vocabulary.

    Raises:
        ConfigError: a file is missing, shorter than one window, of another dtype, or has a token that cannot be, or an
            argument is out of range.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"data.dtype: {dtype} is not one of {', '.join(_DTYPES)}")
    if vocab_size is not None and not 1 <= vocab_size <= LARGEST_VOCABULARY:
        raise ConfigError(f"data.vocab_size: {vocab_size} is not between 1 and {LARGEST_VOCABULARY}")
    lengths = None if token_bytes is None else _read_token_bytes(token_bytes, vocab_size or 1)
    if lengths is not None and vocab_size is None:
        vocab_size = len(lengths)
    train = TokenFile(train_path, context, dtype, "data.train_path", lengths)
    evaluation = TokenFile(eval_path, context, dtype, "data.eval_path", lengths)
    checked = [split.check(vocab_size or LARGEST_VOCABULARY) for split in (train, evaluation)]
    warnings = [line for _, _, lines in checked for line in lines]
    if os.path.samefile(train_path, eval_path):
        warnings.append(f"data.eval_path: {eval_path} is the training file")
    if vocab_size is not None:
        return Splits(train, evaluation, {"context": context, "vocab_size": vocab_size}, warnings)
    largest, reason, _ = max(checked, key=lambda found: found[0].value)
    facts = {"context": context, "vocab_size": largest.value + 1}
    return Splits(train, evaluation, facts, warnings, {"vocab_size": reason})


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
