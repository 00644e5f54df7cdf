"""Windows of a sequence of tokens, the samples of every text data set."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.errors import ConfigError
from trainer.protocols import Batch

BYTE_VOCAB = 256
"""Number of token ids if the tokens are bytes."""


class TokenWindows:
    """Data set of the windows of a sequence of tokens.

    Window i has the tokens from i * context to (i + 1) * context, both included. So every token except the first is a
    target exactly once; tokens after the last whole window are not used.

    Args:
        tokens: integers `[length]`, of any integer dtype.
        context: number of tokens that the model sees, at least 1; a window has one more, the last target.
        origin: beginning of error messages: config key and source, such as `data.train_path: train.bin`.
        token_bytes: length in bytes of the text of each token, integers `[vocab_size]`; None if it is not available.
        bytes_per_token: mean length of the text of a token, for data without `token_bytes`; None if not available.

    Raises:
        ConfigError: `context` is below 1, or there are fewer tokens than one window has.
    """

    def __init__(
        self,
        tokens: npt.NDArray[Any],
        context: int,
        origin: str,
        token_bytes: npt.NDArray[Any] | None = None,
        bytes_per_token: float | None = None,
    ) -> None:
        if context < 1:
            raise ConfigError(f"data.context: {context} is not at least 1")
        if len(tokens) <= context:
            raise ConfigError(
                f"{origin}: {len(tokens)} tokens, shorter than one window of data.context + 1 = {context + 1}"
            )
        self._tokens, self._context, self._token_bytes = tokens, context, token_bytes
        self._bytes_per_token = bytes_per_token

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._context

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the batch: `tokens` int64 `[b, context + 1]`, and `bytes` `[b]` if a length in bytes is available.

        `bytes` is the length of the text of all targets: int64 from `token_bytes`, else float32 from the mean.
        """
        width = self._context
        windows = np.stack([self._tokens[i * width : (i + 1) * width + 1] for i in indices])
        batch = {"tokens": torch.from_numpy(windows.astype(np.int64))}
        if self._token_bytes is not None:
            lengths = self._token_bytes[windows[:, 1:]].sum(1, dtype=np.int64)
            batch["bytes"] = torch.from_numpy(lengths)
        elif self._bytes_per_token is not None:
            batch["bytes"] = torch.full((len(indices),), width * self._bytes_per_token)
        return batch


def byte_windows(documents: Sequence[bytes], context: int, origin: str) -> TokenWindows:
    """Return the windows over the bytes of all documents, with a zero byte after each document.

    Raises:
        ConfigError: `context` is below 1, or there are fewer bytes than one window has.
    """
    text = b"".join(document + b"\0" for document in documents)
    return TokenWindows(np.frombuffer(text, dtype=np.uint8), context, origin, np.ones(BYTE_VOCAB, np.uint8))
