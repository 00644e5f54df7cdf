"""The task of learning features without labels by BYOL, judged by a linear probe (arXiv:2006.07733)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.loop.teachers import chosen
from trainer.protocols import Batch, SampleRandom, Teacher
from trainer.tasks.views import noisy_view

_FOLDS = 5
_RIDGE = 1.0


class BYOL:
    """Task whose loss is the distance of the student's prediction of one view to the teacher's projection of the other.

    The model returns features, a projection and a prediction, float32 `[b, ...]` each (`models.byol.BYOL`). The loss is
    the squared distance of the normalised vectors, for both orders of the two views together. Evaluations fit a linear
    probe: ridge regression of the classes on the features of four fifths of the evaluation set, judged on the last
    fifth, for each fifth in turn. `pixels_accuracy` is that of the raw pixels.

    Args:
        noise: standard deviation of the noise of a view, at least 0; pixels are in [-1, 1].
        teacher: name of the average that teaches; may be null if the run keeps one average.
        primary_metric: metric that decides the winner; null takes the attribute of the class, `probe_accuracy`.

    Raises:
        ConfigError: An argument is out of range.
    """

    primary_metric = "probe_accuracy"
    higher_is_better = ("probe_accuracy", "pixels_accuracy")
    biased = ()
    metric_units: Mapping[str, str] = {}

    def __init__(
        self, noise: float = 0.5, teacher: str | None = None, primary_metric: str | None = None
    ) -> None:
        if not noise >= 0:
            raise ConfigError(f"task.noise: {noise} is not at least 0")
        self._noise, self._teacher = noise, teacher
        if primary_metric is not None:
            self.primary_metric = primary_metric

    def losses(
        self, model: nn.Module, batch: Batch, random: SampleRandom, averages: Mapping[str, Teacher]
    ) -> Tensor:
        """Return the loss of each image, in [0, 8], float32 `[b]`."""
        both = self._two_views(batch, random)
        prediction = model(both)[2]
        target = chosen(averages, self._teacher)(both)[1]
        return _distances(prediction, target)

    def metrics(self, model: nn.Module, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        """Return the loss with the evaluated weights as teacher, and for `set_metrics` features, pixels and labels."""
        _, projection, prediction = model(self._two_views(batch, random))
        return {
            "loss": _distances(prediction, projection),
            "set/features": model(batch["image"])[0].float(),
            "set/pixels": batch["image"].flatten(1),
            "set/label": batch["label"].float(),
        }

    def set_metrics(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replace features, pixels and labels by whether the probe of each image was right."""
        labels = values.pop("set/label").long()
        values["probe_accuracy"] = probed(values.pop("set/features"), labels)
        values["pixels_accuracy"] = probed(values.pop("set/pixels"), labels)
        return values

    def tokens_per_sample(self, batch: Batch) -> int:
        """Return 0, because an image has no tokens in this task."""
        return 0

    def _two_views(self, batch: Batch, random: SampleRandom) -> Tensor:
        images = batch["image"]
        views = [noisy_view(images, self._noise, random) for _ in range(2)]
        return torch.cat(views)


def _distances(prediction: Tensor, target: Tensor) -> Tensor:
    one, other = F.normalize(prediction.float(), dim=-1).chunk(2)
    its, others = F.normalize(target.float(), dim=-1).chunk(2)
    return (one - others).square().sum(-1) + (other - its).square().sum(-1)


def probed(features: Tensor, labels: Tensor) -> Tensor:
    """Return whether the linear probe that was fitted without an image's fold is right, float64 `[samples]`.

    Args:
        features: float64 `[samples, length]`.
        labels: int64 `[samples]`, at least 0.
    """
    right = torch.zeros(len(labels), dtype=torch.float64)
    targets = F.one_hot(labels).double()
    fold = torch.arange(len(labels)) % _FOLDS
    for number in range(_FOLDS):
        fitted, judged = fold != number, fold == number
        if not fitted.any() or not judged.any():
            continue
        mean, scale = features[fitted].mean(0), features[fitted].std(0, correction=0).clamp(min=1e-6)
        inputs = F.pad((features - mean) / scale, (0, 1), value=1.0)
        known = inputs[fitted]
        penalty = _RIDGE * torch.eye(known.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(known.T @ known + penalty, known.T @ targets[fitted])
        right[judged] = ((inputs[judged] @ weights).argmax(-1) == labels[judged]).double()
    return right
