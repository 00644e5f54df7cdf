"""The task of image classification with few labels, taught by an average of the network (mean teacher)."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.loop.teachers import chosen
from trainer.protocols import Batch, SampleRandom, Teacher
from trainer.tasks.classification import Classification, logits_of
from trainer.tasks.views import noisy_view


class MeanTeacher(Classification):
    """Task whose loss is the cross-entropy of the labelled images, and the distance of all images to the teacher.

    Student and teacher see two views of each image, shifted by up to one pixel, with Gaussian noise. The distance is
    the mean squared difference of their class probabilities (Tarvainen and Valpola, 2017, arXiv:1703.01780). A label
    below 0 means that the image has none (`data.labelled`).

    Args:
        consistency: weight of the distance, at least 0; 0 trains on the labelled images alone.
        labelled: fraction of the training images that have a label, in (0, 1]. The cross-entropy is divided by it, so
            that its mean over a batch is that over the labelled images.
        noise: standard deviation of the noise of a view, at least 0; pixels are in [-1, 1].
        teacher: name of the average that teaches; may be null if the run keeps one average.
        label_smoothing: as for `Classification`.
        primary_metric: as for `Classification`.

    Raises:
        ConfigError: An argument is out of range.
    """

    def __init__(
        self,
        consistency: float = 30.0,
        labelled: float = 1.0,
        noise: float = 0.5,
        teacher: str | None = None,
        label_smoothing: float = 0.0,
        primary_metric: str = "loss",
    ) -> None:
        super().__init__(label_smoothing, primary_metric)
        for name, value in (("consistency", consistency), ("noise", noise)):
            if not value >= 0:
                raise ConfigError(f"task.{name}: {value} is not at least 0")
        if not 0 < labelled <= 1:
            raise ConfigError(f"task.labelled: {labelled} is not in (0, 1]")
        self._consistency, self._labelled, self._noise = consistency, labelled, noise
        self._teacher = teacher

    def losses(  # type: ignore[override]
        self, model: nn.Module, batch: Batch, random: SampleRandom, averages: Mapping[str, Teacher]
    ) -> Tensor:
        """Return the loss of each image, in nats, float32 `[b]`."""
        logits = logits_of(model(noisy_view(batch["image"], self._noise, random)))
        has_label = batch["label"] >= 0
        losses = F.cross_entropy(
            logits, batch["label"].clamp(min=0), reduction="none", label_smoothing=self._label_smoothing
        )
        losses = losses * has_label / self._labelled
        if not self._consistency:
            return losses
        teacher = chosen(averages, self._teacher)
        target = logits_of(teacher(noisy_view(batch["image"], self._noise, random)))
        distance = (logits.softmax(-1) - target.softmax(-1)).square().mean(-1)
        return losses + self._consistency * distance
