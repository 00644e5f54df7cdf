"""The data set of the 1,797 handwritten digits, 8 x 8 pixels each, that scikit-learn contains."""

from collections.abc import Sequence
from importlib.metadata import distribution

import numpy as np
import torch
from torch import Tensor

from trainer.data.held_out import check_eval_fraction
from trainer.errors import ConfigError
from trainer.protocols import Batch, Splits

_CLASSES = 10
_PIXEL_MAX = 16
_SPLIT_SEED = 0


class LabelledImages:
    """Data set of images and labels in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the batch `{"image": float32 [b, 1, 8, 8] in [-1, 1], "label": int64 [b]}`."""
        rows = torch.as_tensor(indices)
        return {"image": self._images[rows], "label": self._labels[rows]}


def digits(
    eval_fraction: float = 0.2, label_noise: float = 0.0, seed: int = 0, labelled: float = 1.0
) -> Splits:
    """Load the digits 0 to 9 with a fixed stratified split and, optionally, wrong or few training labels.

    Args:
        eval_fraction: fraction of each class that is kept for evaluation, in (0, 1). Equal fractions give equal splits.
        label_noise: fraction of the training labels that are replaced by another class, in [0, 1]; all other classes
            have the same probability. Evaluation labels are always correct.
        seed: seed of the choice of the replaced labels and of their new classes, at least 0.
        labelled: fraction of each class of the training split that keeps its label, in (0, 1]; all other labels are -1,
            for tasks that learn from images without labels.

    Raises:
        ConfigError: An argument is out of range.
    """
    check_eval_fraction(eval_fraction)
    if not 0 <= label_noise <= 1:
        raise ConfigError(f"data.label_noise: {label_noise} is not in [0, 1]")
    if not 0 < labelled <= 1:
        raise ConfigError(f"data.labelled: {labelled} is not in (0, 1]")
    if seed < 0:
        raise ConfigError(f"data.seed: {seed} is not at least 0")
    pixels, labels = _read()
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / (_PIXEL_MAX / 2) - 1
    held_out = _stratified(labels, eval_fraction)
    train_labels = _with_noise(labels[~held_out], label_noise, seed)
    if labelled < 1:
        train_labels[~_stratified(train_labels, labelled)] = -1
    return Splits(
        LabelledImages(images[~held_out], torch.from_numpy(train_labels)),
        LabelledImages(images[held_out], torch.from_numpy(labels[held_out])),
        {"image_shape": [1, 8, 8], "num_classes": _CLASSES},
    )


def _read() -> tuple[np.ndarray, np.ndarray]:
    """Read scikit-learn's file without importing scikit-learn, which would take most of a second.

    Returns:
        Pixels float64 [1797, 64] in [0, 16], and labels int64 [1797].
    """
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = np.loadtxt(str(file), delimiter=",")
    return rows[:, :-1], rows[:, -1].astype(np.int64)


def _stratified(labels: np.ndarray, fraction: float) -> np.ndarray:
    """Choose `fraction` of the samples of each class, at least one and never all; return a bool array."""
    random = np.random.default_rng(_SPLIT_SEED)
    chosen = np.zeros(len(labels), dtype=bool)
    for label in range(_CLASSES):
        members = random.permutation(np.flatnonzero(labels == label))
        chosen[members[: min(max(1, round(fraction * len(members))), len(members) - 1)]] = True
    return chosen


def _with_noise(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    wrong = random.permutation(len(labels))[: round(share * len(labels))]
    noisy = labels.copy()
    # Adding 1 to 9 modulo 10 gives every other class, and never the correct one.
    noisy[wrong] = (labels[wrong] + random.integers(1, _CLASSES, len(wrong))) % _CLASSES
    return noisy
