"""The 1,797 handwritten digits of 8 x 8 pixels that ship with scikit-learn."""

from collections.abc import Sequence

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
    """Images and labels held in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """`{"image": float32 [b, 1, 8, 8] in [-1, 1], "label": int64 [b]}`."""
        rows = torch.as_tensor(indices)
        return {"image": self._images[rows], "label": self._labels[rows]}


def digits(eval_fraction: float = 0.2, label_noise: float = 0.0, seed: int = 0) -> Splits:
    """Digits 0 to 9 with a fixed stratified split and, optionally, wrong training labels.

    Args:
        eval_fraction: share of each class kept for evaluation, in (0, 1). The split is always the same.
        label_noise: share of the training labels replaced by another class, each equally likely, in [0, 1].
            Evaluation labels stay true.
        seed: which labels are replaced, and by what.

    Raises:
        ConfigError: an argument is out of range.
    """
    from sklearn.datasets import load_digits  # takes a second to import

    check_eval_fraction(eval_fraction)
    if not 0 <= label_noise <= 1:
        raise ConfigError(f"data.label_noise: {label_noise} is not in [0, 1]")
    if seed < 0:
        raise ConfigError(f"data.seed: {seed} is not at least 0")
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / (_PIXEL_MAX / 2) - 1
    held_out = _stratified(labels, eval_fraction)
    train_labels = _with_noise(labels[~held_out], label_noise, seed)
    return Splits(
        LabelledImages(images[~held_out], torch.from_numpy(train_labels)),
        LabelledImages(images[held_out], torch.from_numpy(labels[held_out])),
        {"image_shape": [1, 8, 8], "num_classes": _CLASSES},
    )


def _stratified(labels: np.ndarray, fraction: float) -> np.ndarray:
    """True for `fraction` of each class, at least one sample of it and never all."""
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
    # A shift of 1 to 9 reaches every other class and never the true one.
    noisy[wrong] = (labels[wrong] + random.integers(1, _CLASSES, len(wrong))) % _CLASSES
    return noisy
