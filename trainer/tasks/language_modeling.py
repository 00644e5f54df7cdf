"""Next-token prediction."""

import math
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.protocols import Batch, SampleRandom


class LanguageModeling:
    """Cross-entropy of each token given those before it.

    The model is called with int64 tokens `[b, context]` and answers with logits `[b, context, vocab]`, or
    with an object that has them as `.logits`, as the causal language models of transformers do.
    """

    primary_metric = "loss"
    higher_is_better = ("accuracy",)
    metric_units: ClassVar = {"loss": "nats per token", "bits_per_token": "bits per token"}

    def losses(self, model: nn.Module, batch: Batch, random: SampleRandom) -> Tensor:
        """Mean cross-entropy of each sample, nats per token, float32 `[b]`."""
        return _cross_entropy(_logits(model, batch), batch)

    def metrics(self, model: nn.Module, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        """`loss` (nats per token), `bits_per_token` (per byte for byte data) and `accuracy`."""
        logits = _logits(model, batch)
        loss = _cross_entropy(logits, batch)
        accuracy = (logits.argmax(-1) == batch["tokens"][:, 1:]).float().mean(1)
        return {"loss": loss, "bits_per_token": loss / math.log(2), "accuracy": accuracy}

    def tokens_per_sample(self, batch: Batch) -> int:
        """Tokens predicted in one sample."""
        return batch["tokens"].shape[1] - 1


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    output = model(batch["tokens"][:, :-1])
    logits: Tensor = getattr(output, "logits", output)
    return logits


def _cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    targets = batch["tokens"][:, 1:]
    # float32: in bfloat16 a loss of 3 nats is known to 1/64 only.
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)
