"""Fréchet distance, precision and recall of features.

Expected values: the closed form for Gaussians, with scipy's matrix root; the jackknife, with each sample left out in
turn; point sets whose manifolds are drawn by hand (Kynkäänniemi et al., 2019, k = 3).
"""

import math

import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from tests.makers import normal
from trainer.seeding import StepRandom
from trainer.tasks import feature_metrics
from trainer.tasks.feature_metrics import frechet_distance, on_manifold, precision, recall
from trainer.tasks.flow_matching import FlowMatching


class Still(nn.Module):
    """A model whose velocity is zero."""

    def forward(self, x: Tensor, times: Tensor, classes: Tensor) -> Tensor:
        return torch.zeros_like(x)


def with_moments(samples: int, mean: Tensor, cov: Tensor, seed: int) -> Tensor:
    """Samples whose mean and unbiased covariance are exactly these."""
    raw = normal(samples, len(mean), seed=seed)
    raw = raw - raw.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(raw.T.cov()), raw.T, upper=False).T
    return white @ torch.linalg.cholesky(cov).T + mean


def test_the_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    half, other = normal(5, 5, seed=1), normal(5, 5, seed=2)
    cov_x, cov_y = half @ half.T + torch.eye(5), other @ other.T + torch.eye(5)
    mean_x, mean_y = normal(5, seed=3), normal(5, seed=4)
    x, y = with_moments(40, mean_x, cov_x, 5), with_moments(120, mean_y, cov_y, 6)
    root = scipy.linalg.sqrtm((cov_x @ cov_y).numpy()).real
    expected = float((mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace()) - 2 * root.trace()
    values = frechet_distance(x.view(40, 5, 1), y.view(40, 3, 5, 1))
    assert values.shape == (40,) and values.dtype == torch.float64
    assert float(values.mean()) == pytest.approx(expected, rel=1e-9)


def test_the_frechet_distance_of_variances_on_axes_is_that_of_their_standard_deviations() -> None:
    """(1 - 3)^2 + (2 - 2)^2 + 4^2 of the means; the third pixel is constant in both, as the corners of digits are."""
    x = with_moments(30, torch.zeros(2).double(), torch.diag(torch.tensor([1.0, 4.0])).double(), 1)
    y = with_moments(30, torch.tensor([4.0, 0.0]).double(), torch.diag(torch.tensor([9.0, 4.0])).double(), 2)
    x, y = (torch.cat([side, torch.full((30, 1), -1.0).double()], 1) for side in (x, y))
    assert float(frechet_distance(x, y[:, None]).mean()) == pytest.approx(4 + 16, rel=1e-6)
    assert float(frechet_distance(x, x[:, None]).mean()) == pytest.approx(0, abs=1e-9)


def test_the_error_of_a_frechet_distance_is_that_of_the_jackknife() -> None:
    x, y = normal(300, 4), 1.5 * normal(300, 2, 4, seed=1) + 0.5
    values = frechet_distance(x, y)
    kept = [torch.arange(300) != i for i in range(300)]
    without = torch.stack([frechet_distance(x[rows], y[rows]).mean() for rows in kept])
    error = (299 / 300 * (without - without.mean()).square().sum()).sqrt()
    assert float(values.std() / 300**0.5) == pytest.approx(float(error), rel=0.02)
    pseudo = values.mean() + 299 * (without.mean() - without)
    assert float(torch.corrcoef(torch.stack([values, pseudo]))[0, 1]) > 0.999


def test_features_that_are_not_finite_have_no_frechet_distance() -> None:
    x, y = normal(5, 2), normal(5, 1, 2)
    y[3] = math.nan
    assert frechet_distance(x, y).isnan().all()
    assert frechet_distance(x[:1], normal(1, 1, 2)).shape == (1,)


LINE = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]]).double()
"""Distances to the third neighbour: 3, 2, 2, 3 and 9; so the manifold is [-3, 19]."""


@pytest.mark.parametrize("block", [1024, 2])
def test_the_manifold_is_the_union_of_balls_up_to_the_third_neighbour(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_metrics, "BLOCK", block)
    points = torch.tensor([[-3.1], [-3.0], [1.5], [19.0], [19.1], [math.nan]]).double()
    assert on_manifold(points, LINE).tolist() == [0, 1, 1, 1, 0, 0]
    # [0, 3], [0, 3], [-1, 3], [0, 6] without the point at 10
    assert on_manifold(torch.tensor([[6.0], [6.1], [-3.0]]).double(), LINE[:4]).tolist() == [1, 0, 1]


def test_precision_counts_generated_images_and_recall_real_ones() -> None:
    """Generated at 20 and 0 for each real sample; the manifold of 5 points at 20 and 5 at 0 is these two points."""
    generated = torch.tensor([20.0, 0.0]).double().view(1, 2, 1).expand(5, 2, 1)
    assert precision(LINE, generated).tolist() == [0.5] * 5
    assert recall(LINE, generated).tolist() == [1, 0, 0, 0, 0]
    same = LINE[:, None]
    assert precision(LINE, same).tolist() == recall(LINE, same).tolist() == [1] * 5
    far = same + 100
    assert precision(LINE, far).tolist() == recall(LINE, far).tolist() == [0] * 5


@pytest.mark.parametrize("channels", [3, 4])
def test_generated_and_real_images_are_compared_over_the_same_range(channels: int) -> None:
    """Noise is what a model without velocity generates, here of the very distribution of the latents."""
    task = FlowMatching([channels, 2, 2], 10, distance_steps=1, distances=["recall"])
    batch = {"image": normal(200, channels, 2, 2, seed=1).float(), "label": torch.arange(200) % 10}
    random = StepRandom(0, 0, count=200, total=200)
    found = task.metrics(Still(), batch, random)
    assert task.set_metrics({name: values.double() for name, values in found.items()})["recall"].mean() > 0.7
    is_cut = channels == 3  # pictures are in [-1, 1], latents are not
    assert all(bool(found[name].abs().max() == 1) == is_cut for name in ("set/real", "set/generated"))
    pixels = task.images(Still(), random)
    assert (pixels.min(), pixels.max()) == (0, 1)
