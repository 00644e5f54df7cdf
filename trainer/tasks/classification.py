"""The task of image classification: one label per image."""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.protocols import Batch, SampleRandom
from trainer.tasks.set_metrics import calibration_error


class Classification:
    """Task whose loss is the cross-entropy of the label.

    The model is called with images float32 `[b, c, h, w]`. It returns logits `[b, classes]`, or an object with the
    logits as `.logits`.

    Args:
        label_smoothing: fraction of the target that is spread evenly over all classes, in [0, 1). It affects only the
            training loss, so that evaluation losses of runs with different values can be compared.
        primary_metric: metric that decides the winner: `loss`, `accuracy`, or a metric of the user's own.

    Raises:
        ConfigError: An argument is out of range.
    """

    higher_is_better = ("accuracy",)
    biased = ("ece",)
    metric_units: ClassVar = {"loss": "nats", "ece": "calibration error"}

    def __init__(self, label_smoothing: float = 0.0, primary_metric: str = "loss") -> None:
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"task.label_smoothing: {label_smoothing} is not in [0, 1)")
        self._label_smoothing = label_smoothing
        self.primary_metric = primary_metric

    def losses(self, model: nn.Module, batch: Batch, random: SampleRandom) -> Tensor:
        """Return the cross-entropy of each sample with its smoothed label, in nats, float32 `[b]`."""
        logits = logits_of(model(batch["image"]))
        return F.cross_entropy(
            logits, batch["label"], reduction="none", label_smoothing=self._label_smoothing
        )

    def metrics(self, model: nn.Module, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        """Return `loss` (negative log-likelihood in nats, label not smoothed) and `accuracy` (1 if correct, else 0).

        For `set_metrics` it also returns the probability of the predicted class.
        """
        logits = logits_of(model(batch["image"]))
        confidence, predicted = logits.softmax(-1).max(-1)
        return {
            "loss": F.cross_entropy(logits, batch["label"], reduction="none"),
            "accuracy": (predicted == batch["label"]).float(),
            "set/confidence": confidence,
        }

    def set_metrics(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replace the probabilities of the predicted classes by `ece`, the expected calibration error."""
        if "set/confidence" in values:
            values["ece"] = calibration_error(values.pop("set/confidence"), values["accuracy"])
        return values

    def tokens_per_sample(self, batch: Batch) -> int:
        """Return 0, because an image has no tokens in this task."""
        return 0


def logits_of(output: Any) -> Tensor:
    """Return what a model returned as logits, float32 `[..., classes]`."""
    logits: Tensor = getattr(output, "logits", output)
    # In float32, because bfloat16 has a precision of only 1/64 at a loss of 3 nats.
    return logits.float()
