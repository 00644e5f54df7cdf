"""The task of language modeling: prediction of the next token."""

import math
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.protocols import Batch, SampleRandom
from trainer.tasks.classification import logits_of
from trainer.tasks.set_metrics import perplexity, ratio


class LanguageModeling:
    """Task whose loss is the cross-entropy of each token, given the tokens before it.

    A batch has `tokens` int64 `[b, context + 1]`. If the data set has the length of each token's text, the batch also
    has `bytes` `[b]`, the length of the text of all target tokens. The model is called with all tokens except the last
    one. It returns logits `[b, context, vocab]`, or an object with the logits as `.logits` (like the models of
    transformers).

    Args:
        primary_metric: metric that decides the winner; null takes the attribute of the class, `loss`.
    """

    primary_metric = "loss"
    higher_is_better = ("accuracy",)
    biased = ()
    metric_units: ClassVar = {"loss": "nats per token"}

    def __init__(self, primary_metric: str | None = None) -> None:
        if primary_metric is not None:
            self.primary_metric = primary_metric

    def losses(self, model: nn.Module, batch: Batch, random: SampleRandom) -> Tensor:
        """Return the mean cross-entropy of each sample, in nats per token, float32 `[b]`."""
        return _cross_entropy(logits_of(model(batch["tokens"][:, :-1])), batch)

    def metrics(self, model: nn.Module, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        """Return `loss` (nats per token) and `accuracy` (fraction of tokens) of each sample, float32 `[b]` each.

        If the batch has `bytes`, the result also has bits and bytes of each sample for `set_metrics`.
        """
        logits = logits_of(model(batch["tokens"][:, :-1]))
        loss = _cross_entropy(logits, batch)
        accuracy = (logits.argmax(-1) == batch["tokens"][:, 1:]).float().mean(1)
        values = {"loss": loss, "accuracy": accuracy}
        if "bytes" in batch:
            bits = loss * self.tokens_per_sample(batch) / math.log(2)
            values |= {"set/bits": bits, "set/bytes": batch["bytes"]}
        return values

    def set_metrics(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add `perplexity`, exp of the mean loss, and `bits_per_byte` if the data set has bytes.

        `bits_per_byte` is the sum of all bits divided by the sum of all bytes of text. It can be compared between
        tokenisers.
        """
        values["perplexity"] = perplexity(values["loss"])
        if "set/bits" in values:
            values["bits_per_byte"] = ratio(values.pop("set/bits"), values.pop("set/bytes"))
        return values

    def tokens_per_sample(self, batch: Batch) -> int:
        """Return the number of predicted tokens in one sample."""
        return batch["tokens"].shape[1] - 1


def _cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    targets = batch["tokens"][:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)
