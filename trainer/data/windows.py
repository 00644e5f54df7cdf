"""Windows of a sequence of tokens: what every text data set hands out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.errors import ConfigError
from trainer.protocols import Batch

BYTE_VOCAB = 256
"""Vocabulary of data whose tokens are bytes."""


class TokenWindows:
    """Window i is tokens [i * context, (i + 1) * context], so each token but the first is a target exactly once.

    Args:
        tokens: integers `[length]`, of any integer dtype.
        context: tokens a model sees; a window has one more, the last target.
        origin: key and source that an error names, such as `data.train_path: train.bin`.
        token_bytes: length of the text of each token, integers `[vocab_size]`; None if unknown.

    Raises:
        ConfigError: `context` is below 1, or the tokens are shorter than one window.
    """

    def __init__(
        self,
        tokens: npt.NDArray[Any],
        context: int,
        origin: str,
        token_bytes: npt.NDArray[Any] | None = None,
    ) -> None:
        if context < 1:
            raise ConfigError(f"data.context: {context} is not at least 1")
        if len(tokens) <= context:
            raise ConfigError(
                f"{origin}: {len(tokens)} tokens, shorter than one window of data.context + 1 = {context + 1}"
            )
        self._tokens, self._context, self._token_bytes = tokens, context, token_bytes

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._context

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """`tokens` int64 `[b, context + 1]`; `bytes` int64 `[b]`, of the targets' text, where they are known."""
        width = self._context
        windows = np.stack([self._tokens[i * width : (i + 1) * width + 1] for i in indices])
        batch = {"tokens": torch.from_numpy(windows.astype(np.int64))}
        if self._token_bytes is not None:
            lengths = self._token_bytes[windows[:, 1:]].sum(1, dtype=np.int64)
            batch["bytes"] = torch.from_numpy(lengths)
        return batch


def byte_windows(documents: Sequence[bytes], context: int, origin: str) -> TokenWindows:
    """Windows over the bytes of `documents`, each of which ends with a zero byte.

    Raises:
        ConfigError: as `TokenWindows`.
    """
    text = b"".join(document + b"\0" for document in documents)
    return TokenWindows(np.frombuffer(text, dtype=np.uint8), context, origin, np.ones(BYTE_VOCAB, np.uint8))
