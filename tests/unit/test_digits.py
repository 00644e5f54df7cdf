"""The data set of digits: scikit-learn's 1,797 with values 0 to 16, split by class, with a share of wrong labels."""

import numpy as np
import pytest
import torch

from tests.makers import whole
from trainer.data.digits import digits


def test_digits_are_all_there_scaled_and_split_by_class() -> None:
    from sklearn.datasets import load_digits  # takes a second

    splits = digits()
    train, evaluation = whole(splits.train), whole(splits.eval)
    assert dict(splits.facts) == {"image_shape": [1, 8, 8], "num_classes": 10}
    images = torch.cat([train["image"], evaluation["image"]])
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    pixels, labels = load_digits(return_X_y=True)
    theirs = sorted(zip(((pixels / 8) - 1).astype(np.float32).tolist(), labels.tolist(), strict=True))
    own = zip(
        images.flatten(1).tolist(), torch.cat([train["label"], evaluation["label"]]).tolist(), strict=True
    )
    assert sorted(own) == theirs
    assert torch.equal(images * 8, (images * 8).round())
    share = evaluation["label"].bincount() / torch.cat([train["label"], evaluation["label"]]).bincount()
    assert share.tolist() == pytest.approx([0.2] * 10, abs=0.003)
    assert not {image.numpy().tobytes() for image in train["image"]} & {
        image.numpy().tobytes() for image in evaluation["image"]
    }


def test_label_noise_is_its_share_of_training_labels_and_always_wrong() -> None:
    clean, noisy = whole(digits().train), whole(digits(label_noise=0.3, seed=1).train)
    assert torch.equal(clean["image"], noisy["image"])
    wrong = clean["label"] != noisy["label"]
    assert int(wrong.sum()) == round(0.3 * len(wrong))
    shift = (noisy["label"] - clean["label"])[wrong] % 10
    # Nine equally likely shifts: a chi-squared with 8 degrees of freedom, below 26.1 with probability 0.999.
    counts = shift.bincount(minlength=10)[1:].float()
    expected = counts.sum() / 9
    assert ((counts - expected) ** 2 / expected).sum() < 26.1
    assert torch.equal(whole(digits(label_noise=0.3, seed=1).train)["label"], noisy["label"])
    assert not torch.equal(whole(digits(label_noise=0.3, seed=2).train)["label"], noisy["label"])
    evaluation = digits(label_noise=1.0).eval
    assert torch.equal(whole(evaluation)["label"], whole(digits().eval)["label"])
