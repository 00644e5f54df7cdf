"""The data set of token files: `.bin` files of consecutive integers, as nanoGPT writes them, or `.npy` files."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.npy import is_npy, map_npy
from trainer.data.token_files import LARGEST_VOCABULARY, TOKEN_BYTES, Token, check_tokens, map_tokens
from trainer.data.windows import TokenWindows
from trainer.errors import ConfigError, blamed_on
from trainer.protocols import Splits
from trainer.rundir.files import read_json

_DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")


class TokenFile(TokenWindows):
    """Data set of the windows of a memory-mapped token file; only the pages that a batch needs are read.

    Each worker process of a DataLoader maps the file itself, because pickling a memory map would copy the whole file.

    Args:
        path: path of the file.
        context, token_bytes, bytes_per_token: as for `TokenWindows`.
        dtype: numpy's name of the integer type in a file that is no `.npy` file.
        key: config key of `path`, for error messages.

    Raises:
        ConfigError: The file is missing, its size is not a multiple of the integer type, or it is too short.
    """

    def __init__(
        self,
        path: str,
        context: int,
        dtype: str,
        key: str,
        token_bytes: npt.NDArray[Any] | None = None,
        bytes_per_token: float | None = None,
    ) -> None:
        self._arguments = (path, context, dtype, key, token_bytes, bytes_per_token)
        self._path, self._origin = path, f"{key}: {path}"
        super().__init__(
            map_tokens(path, dtype, self._origin), context, self._origin, token_bytes, bytes_per_token
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFile, self._arguments

    def check(self, below: int) -> tuple[Token, str, list[str]]:
        """Read the whole file once; return its largest token, a clause that names it, and warnings.

        Raises:
            ConfigError: The file looks like integers of another dtype, or a token is not in 0 to `below` - 1.
        """
        npy = is_npy(self._path)
        largest = check_tokens(self._tokens, self._origin, raw=not npy, below=below)
        header = (
            f"{self._origin} is a .npy file: its header's dtype {self._tokens.dtype} is used, not data.dtype"
        )
        return largest, f"{self._origin} has {largest}", [header] if npy else []


def tokens(
    train_path: str,
    eval_path: str | None = None,
    context: int = 1024,
    dtype: str | None = None,
    vocab_size: int | None = None,
    token_bytes: str | None = None,
) -> Splits:
    """Load two token files, one per split, and read each once to check its tokens.

    Args:
        train_path: file of the training split: `.bin`, or `.npy` of integers `[length]`; or the folder that the command
            `tokenize` wrote.
        eval_path: file of the evaluation split; None takes that of the folder of the command `tokenize`.
        context: number of tokens that the model sees, at least 1; a window has one more.
        dtype: integer type in the `.bin` files: `uint8`, `uint16` (nanoGPT), `uint32`, `int32` or `int64`. None takes
            that of `meta.json` beside `train_path`, as the command `tokenize` writes it, else `uint16`.
        vocab_size: number of token ids: every token must be below it, and the model's vocabulary may not be smaller.
            None takes the length of `token_bytes`, else that of `meta.json`, else the largest token.
        token_bytes: `.npy` file of integers: the number of bytes of the text of each token. With it, evaluations also
            give bits per byte. None takes the file `token_bytes.npy` of the command `tokenize`; without that file, bits
            per byte use the mean bytes per token of `meta.json`.

    Raises:
        ConfigError: A file is missing, shorter than one window, of another dtype or has an impossible token, or an
            argument is out of range.
    """
    train_path, eval_path = _files(train_path, eval_path)
    meta = _read_meta(train_path, eval_path)
    dtype = dtype or meta.get("dtype", "uint16")
    if dtype not in _DTYPES:
        raise ConfigError(f"data.dtype: {dtype} is not one of {', '.join(_DTYPES)}")
    if vocab_size is not None and not 1 <= vocab_size <= LARGEST_VOCABULARY:
        raise ConfigError(f"data.vocab_size: {vocab_size} is not between 1 and {LARGEST_VOCABULARY}")
    lengths, warnings = _token_bytes(token_bytes, vocab_size, train_path, meta)
    if lengths is not None and vocab_size is None:
        vocab_size = len(lengths)
    vocab_size = vocab_size or meta.get("vocab_size")
    train, evaluation = (
        TokenFile(path, context, dtype, key, lengths, _mean_bytes(path, meta))
        for key, path in (("data.train_path", train_path), ("data.eval_path", eval_path))
    )
    below = min(vocab_size or LARGEST_VOCABULARY, LARGEST_VOCABULARY if lengths is None else len(lengths))
    checked = [split.check(below) for split in (train, evaluation)]
    warnings += [line for _, _, lines in checked for line in lines]
    if os.path.samefile(train_path, eval_path):
        warnings.append(f"data.eval_path: {eval_path} is the training file")
    if vocab_size is not None:
        return Splits(train, evaluation, {"context": context, "vocab_size": vocab_size}, warnings)
    largest, reason, _ = max(checked, key=lambda found: found[0].value)
    facts = {"context": context, "vocab_size": largest.value + 1}
    return Splits(train, evaluation, facts, warnings, {"vocab_size": reason})


def _mean_bytes(path: str, meta: dict[str, Any]) -> float | None:
    """Return the mean bytes of a token that the command `tokenize` measured in this file; None for other files."""
    mean: float | None = (
        meta.get(f"{Path(path).stem}_bytes_per_token") if Path(path).suffix == ".bin" else None
    )
    return mean


def _token_bytes(
    path: str | None, vocab_size: int | None, train_path: str, meta: dict[str, Any]
) -> tuple[npt.NDArray[Any] | None, list[str]]:
    """Read the number of bytes of each token; for files of the command `tokenize`, from the table beside them.

    Returns:
        Integers `[vocab_size]`, or None if there are none; and a warning if the command wrote no table.
    """
    if path is None and meta:
        beside = Path(train_path).with_name(TOKEN_BYTES)
        if not beside.is_file():
            return None, [
                f"data.train_path: {beside} is missing, so bits_per_byte uses the mean bytes per token of each file"
            ]
        # `vocab_size` may be above the tokenizer's: models are padded to a multiple of 64.
        path, vocab_size = str(beside), meta["vocab_size"]
    return (None if path is None else _read_token_bytes(path, vocab_size or 1)), []


def _files(train_path: str, eval_path: str | None) -> tuple[str, str]:
    """Return the files of both splits; a folder of the command `tokenize` gives what is left out."""
    if os.path.isdir(train_path):
        train_path = str(Path(train_path, "train.bin"))
    folder = Path(train_path).parent
    if eval_path is None:
        if not os.path.exists(train_path):
            raise ConfigError(
                f"data.train_path: {train_path} is no file and no folder of the command tokenize"
            )
        eval_path = str(folder / "eval.bin")
        if not _read_meta(train_path, eval_path):
            raise ConfigError(
                f"data.eval_path: expected a file, because {folder} was not written by the command tokenize"
            )
    return train_path, eval_path


def _read_meta(train_path: str, eval_path: str) -> dict[str, Any]:
    """Return what the command `tokenize` wrote about both files; nothing if they are not from one such folder.

    Raises:
        ConfigError: The `meta.json` of the command is damaged.
    """
    path = Path(train_path).with_name("meta.json")
    if not path.is_file() or Path(eval_path).parent != path.parent:
        return {}
    with blamed_on("data.train_path"):
        meta = read_json(path)
    if not isinstance(meta, dict) or "tokenizer_sha256" not in meta:  # another program's
        return {}
    means = [meta.get(f"{split}_bytes_per_token") for split in ("train", "eval")]
    if not all(isinstance(mean, float) and 0 < mean < math.inf for mean in means):
        raise ConfigError(f"data.train_path: {path} is damaged, expected what the command tokenize writes")
    size = meta.get("vocab_size")
    if meta.get("dtype") not in _DTYPES or not isinstance(size, int) or not 0 < size <= LARGEST_VOCABULARY:
        raise ConfigError(f"data.train_path: {path} has no valid dtype and vocab_size")
    return meta


def _read_token_bytes(path: str, at_least: int) -> npt.NDArray[Any]:
    expected = f"expected a .npy file of at least {at_least} integers from 0 to 2^31, not all 0"
    try:
        if not os.path.isfile(path):  # opening a pipe would wait
            raise OSError("no regular file")
        lengths = map_npy(path)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"data.token_bytes: {path} cannot be read ({error}), {expected}") from error
    if not isinstance(lengths, np.ndarray) or lengths.dtype.kind not in "iu" or lengths.ndim != 1:
        raise ConfigError(f"data.token_bytes: {path} has other contents, {expected}")
    if len(lengths) < at_least or lengths.min() < 0 or not 0 < lengths.max() <= 2**31:
        raise ConfigError(
            f"data.token_bytes: {path} has {len(lengths)} integers, or some of them are out of range, {expected}"
        )
    return np.array(lengths)
