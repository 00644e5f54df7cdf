"""BYOL: its loss against the formula, and the linear probe on features whose answer is known."""

import pytest
import torch
from torch import Tensor, nn

from models.byol import BYOL as Network
from tests.makers import refusal_of
from trainer.seeding import StepRandom
from trainer.tasks.byol import BYOL, probed

IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
BATCH = {"image": IMAGES, "label": torch.tensor([0, 1, 2, 3])}


class Fixed(nn.Module):
    """Answers with a projection and a prediction of the first pixels; keeps what it saw."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset, self.seen = offset, torch.empty(0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.seen = x
        flat = x.flatten(1)
        return flat, flat[:, :5] + self.offset, flat[:, 5:10] - self.offset


def test_the_loss_is_that_of_both_orders_of_the_views() -> None:
    """|a - b|^2 of unit vectors is 2 - 2 cos."""
    student, teacher = Fixed(0.5), Fixed(1.0)
    found = BYOL().losses(student, BATCH, StepRandom(0, 1, 0, 4, 4), {"0.9": teacher})
    assert torch.equal(student.seen, teacher.seen)
    prediction, projection = student(student.seen)[2], teacher(teacher.seen)[1]
    cosine = nn.functional.cosine_similarity
    expected = 4 - 2 * cosine(prediction[:4], projection[4:]) - 2 * cosine(prediction[4:], projection[:4])
    torch.testing.assert_close(found, expected)
    assert not torch.equal(student.seen[:4], student.seen[4:])


def test_the_probe_is_right_where_classes_are_linear_and_by_chance_where_features_say_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    clear = nn.functional.one_hot(labels, 3).double() @ torch.randn(
        3, 7, generator=generator, dtype=torch.float64
    )
    assert probed(clear, labels).tolist() == [1.0] * 300
    noise = torch.randn(300, 7, generator=generator, dtype=torch.float64)
    assert probed(noise, labels).mean().item() == pytest.approx(1 / 3, abs=0.1)


def test_the_metrics_are_the_probes_of_features_and_of_pixels() -> None:
    task = BYOL()
    values = task.metrics(Fixed(0.0), BATCH, StepRandom(0, 1, 0, 4, 4))
    metrics = task.set_metrics({name: value.double() for name, value in values.items()})
    assert sorted(metrics) == ["loss", "pixels_accuracy", "probe_accuracy"]
    assert torch.equal(metrics["pixels_accuracy"], metrics["probe_accuracy"])  # its features are the pixels


def test_the_network_returns_features_projection_and_prediction() -> None:
    network = Network(64, 16, 12, 8)
    assert [tuple(part.shape) for part in network(IMAGES)] == [(4, 12), (4, 8), (4, 8)]
    blocks = {id(p) for block in network.shard_blocks() for p in block.parameters()}
    assert blocks == {id(p) for p in network.parameters()}


def test_bad_arguments_are_refused_by_name() -> None:
    assert refusal_of(BYOL, noise=-1.0) == "task.noise: -1.0 is not at least 0"
    with pytest.raises(ValueError, match="hidden"):
        Network(64, 0, 12, 8)
