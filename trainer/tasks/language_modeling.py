"""Next-token prediction."""

import math
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.protocols import Batch, SampleRandom
from trainer.tasks.set_metrics import perplexity, ratio


class LanguageModeling:
    """Cross-entropy of each token given those before it.

    A batch has `tokens` int64 `[b, context + 1]` and, where the data knows it, `bytes` `[b]`, the length of the text
    that the targets stand for. The model is called with all tokens but the last and answers with logits
    `[b, context, vocab]`, or with an object that has them as `.logits`, as the models of transformers do.
    """

    primary_metric = "loss"
    higher_is_better = ("accuracy",)
    biased = ()
    metric_units: ClassVar = {"loss": "nats per token"}

    def losses(self, model: nn.Module, batch: Batch, random: SampleRandom) -> Tensor:
        """Mean cross-entropy of each sample, nats per token, float32 `[b]`."""
        return _cross_entropy(_logits(model, batch), batch)

    def metrics(self, model: nn.Module, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        """`loss` (nats per token) and `accuracy`; where the data knows its bytes, more for `set_metrics`."""
        logits = _logits(model, batch)
        loss = _cross_entropy(logits, batch)
        accuracy = (logits.argmax(-1) == batch["tokens"][:, 1:]).float().mean(1)
        found = {"loss": loss, "accuracy": accuracy}
        if "bytes" in batch:
            bits = loss * self.tokens_per_sample(batch) / math.log(2)
            found |= {"set/bits": bits, "set/bytes": batch["bytes"]}
        return found

    def set_metrics(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds `perplexity`, exp of the mean loss, and `bits_per_byte` where the data knows its bytes.

        The latter are all bits of the set by all bytes of its text, which does not depend on the tokeniser.
        """
        values["perplexity"] = perplexity(values["loss"])
        if "set/bits" in values:
            values["bits_per_byte"] = ratio(values.pop("set/bits"), values.pop("set/bytes"))
        return values

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
