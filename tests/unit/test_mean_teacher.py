"""Classification with few labels, taught by an average: its loss against the formula, and its views."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.makers import random_of, refusal_of
from trainer.data.digits import digits
from trainer.tasks.mean_teacher import MeanTeacher
from trainer.tasks.views import shifted

IMAGES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
LABELS = torch.tensor([3, -1, -1, 0, -1, -1])


class Seen(nn.Module):
    """Logits that grow with the first ten pixels; keeps what it saw."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.seen = factor, torch.empty(0)

    def forward(self, x: Tensor, train: bool = False) -> Tensor:
        self.seen = x
        return self.factor * x.flatten(1)[:, :10]


def test_the_loss_is_the_cross_entropy_of_labels_and_the_distance_of_two_views() -> None:
    student, teacher = Seen(2.0), Seen(3.0)
    task = MeanTeacher(consistency=7.0, labelled=1 / 3, noise=0.1)
    found = task.losses(student, {"image": IMAGES, "label": LABELS}, random_of(6), {"0.9": teacher})
    answer, target = student(student.seen), teacher(teacher.seen)
    assert not torch.equal(student.seen, teacher.seen)
    distance = (answer.softmax(-1) - target.softmax(-1)).square().sum(-1) / 10
    expected = 7 * distance
    for row in (0, 3):
        expected[row] += 3 * -answer.log_softmax(-1)[row, LABELS[row]]
    torch.testing.assert_close(found, expected)


def test_without_consistency_only_images_with_a_label_count_and_nothing_teaches() -> None:
    task = MeanTeacher(consistency=0.0, labelled=1 / 3)
    model = Seen(1.0)
    found = task.losses(model, {"image": IMAGES, "label": LABELS}, random_of(6), {})
    assert found.nonzero().flatten().tolist() == [0, 3]
    assert found[0].item() == pytest.approx(3 * F.cross_entropy(model(model.seen[:1]), LABELS[:1]).item())


def test_a_view_is_the_image_shifted_by_at_most_a_pixel() -> None:
    image = torch.arange(9.0).view(1, 1, 3, 3).expand(200, 1, 3, 3)
    views = shifted(image, random_of(200))
    padded = F.pad(image[:1], (1, 1, 1, 1), value=-1.0)
    expected = {
        (row, column): padded[0, 0, row : row + 3, column : column + 3]
        for row in range(3)
        for column in range(3)
    }
    counts = {place: sum(torch.equal(view[0], one) for view in views) for place, one in expected.items()}
    assert sum(counts.values()) == 200 and min(counts.values()) > 200 / 9 - 4 * math.sqrt(200 / 9)


def test_the_digits_keep_a_share_of_each_classes_labels() -> None:
    splits = digits(labelled=0.05)
    labels = splits.train.__getitems__(range(len(splits.train)))["label"]
    counts = labels[labels >= 0].bincount(minlength=10)
    assert len(counts) == 10 and counts.min() == counts.max() == 7
    assert splits.eval.__getitems__(range(len(splits.eval)))["label"].min() == 0


def test_bad_arguments_are_refused_by_name() -> None:
    assert refusal_of(MeanTeacher, consistency=-1.0) == "task.consistency: -1.0 is not at least 0"
    assert refusal_of(MeanTeacher, noise=-1.0) == "task.noise: -1.0 is not at least 0"
    assert refusal_of(MeanTeacher, labelled=0.0) == "task.labelled: 0.0 is not in (0, 1]"
    assert refusal_of(digits, labelled=0.0) == "data.labelled: 0.0 is not in (0, 1]"
    batch = {"image": IMAGES, "label": LABELS}
    several = {"a": Seen(1.0), "b": Seen(1.0)}
    refused = refusal_of(MeanTeacher().losses, Seen(1.0), batch, random_of(6), several)
    assert refused == "task.teacher: expected one of a, b, got null"
