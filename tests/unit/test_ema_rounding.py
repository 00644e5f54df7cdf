"""The sizes of rounding errors: closed forms, and averages of random walks in float32 against float64."""

import math

import pytest
import torch
from torch import nn

from ema import EMAConfig, ExponentialMovingAverage
from ema.posthoc import Snapshot
from ema.rounding import distances, roundings


def constant(step: int, decay: float) -> Snapshot:
    return Snapshot(step, EMAConfig(decay=decay))


def test_distances_count_steps() -> None:
    """An average of constant decay d is d / sqrt(1 - d^2) steps from the live weights, and k steps are sqrt(k)."""
    ones, others = (
        [constant(4000, 0.9), Snapshot(16), Snapshot(5)],
        [Snapshot(4000), Snapshot(0), Snapshot(5)],
    )
    assert distances(ones, others) == pytest.approx([0.9 / math.sqrt(1 - 0.81), 4, 0])
    assert distances([], []) == []


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (EMAConfig(decay=0.8), 40),
        (EMAConfig(decay=0.999), 2000),
        (EMAConfig(decay=0.99, update_every=4, start_iter=30), 500),
        (EMAConfig(type="power", sigma_rel=0.1), 900),
        (EMAConfig(type="warmup", decay=0.99), 700),
        (EMAConfig(type="debiased", decay=0.995), 300),
    ],
)
def test_each_update_rounds_once_and_later_decays_reduce_it(config: EMAConfig, steps: int) -> None:
    """The same walk in float64 has no rounding that counts. Weights at which a rounding is a usual share of them."""
    torch.manual_seed(0)
    model = nn.Linear(2000, 1, bias=False)
    model.weight.data.copy_(torch.randn(1, 2000).exp())
    walks = [model, nn.Linear(2000, 1, bias=False).double()]
    walks[1].load_state_dict(model.state_dict())
    averages = [ExponentialMovingAverage(model, config)]
    averages.append(ExponentialMovingAverage(walks[1], EMAConfig(**{**vars(config), "dtype": "float64"})))
    for step in range(steps + 1):
        for walk, average in zip(walks, averages, strict=True):
            average.update(walk, iteration=step)
        model.weight.data.mul_(1 + 0.01 * torch.randn(1, 2000))
        walks[1].load_state_dict(model.state_dict())
    rounded, exact = (average.state_dict()["weight"].double() for average in averages)
    found = float((rounded - exact).norm() / exact.norm()) / torch.finfo(torch.float32).eps
    expected, live = roundings([Snapshot(steps, config), Snapshot(steps)])
    assert expected == pytest.approx(found, rel=0.15) and live == 0


def test_roundings_of_one_series_and_their_limits() -> None:
    series = [constant(step, 0.999) for step in (20_000, 5, 0)]
    long, short, none = roundings(series)
    assert long == pytest.approx(0.21 * math.sqrt(1 / (1 - 0.999**2)))
    assert short == pytest.approx(0.21 * math.sqrt(sum(0.999 ** (2 * age) for age in range(5))))
    assert none == 0
    assert roundings([constant(50, 0.0), constant(50, 1.0), Snapshot(50)]) == [0, 0, 0]
    assert roundings([]) == []
