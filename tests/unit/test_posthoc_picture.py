"""The picture of averages that were made after the run."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.synthesizing.picture import draw, smooth
from launch.synthesizing.trials import Trial
from tests.unit.test_trials import trial


def made(name: str, half_b: float, horizon: float | None, noise: float = 0.0) -> Trial:
    one = trial(name, half_b, half_b, noise=noise)
    return Trial(name, one.values, horizon=horizon)


def test_the_picture_has_the_curve_the_stored_weights_and_the_interval(tmp_path: Path) -> None:
    decays = [
        made(f"decay {1 - 1 / h:g}", 1 + np.log(h / 8) ** 2 / 9, h, 0.1 * (h == 16)) for h in (4, 8, 16, 32)
    ]
    stored = [made("live", 1.3, None), made("ema/p05", 1.02, 11.0)]
    path = tmp_path / "r.png"
    assert draw(path, [*stored, *decays], "loss", 7, higher_is_better=False)
    svg = path.with_suffix(".svg").read_text()
    assert svg.startswith("<svg ") and svg.endswith("</svg>\n")
    for text in (
        "live: 1.3",
        "EMA p05: 1.02",
        "loss at step 7, half B",
        "decay 0.9375: 1.0534",
        "decays that half B does not",
    ):
        assert text in svg, text
    with Image.open(path) as image:
        assert image.width == 960


def test_without_two_horizons_there_is_no_picture(tmp_path: Path) -> None:
    trials = [made("live", 1.3, None), made("decay 0.5", 1.2, 2.0), made("decay 0.9", float("nan"), 10.0)]
    assert not draw(tmp_path / "r.png", trials, "loss", 7, higher_is_better=False)
    assert not list(tmp_path.iterdir())


def test_the_curve_goes_through_its_points_and_never_beyond_them() -> None:
    x, y = np.log([2.0, 4.0, 8.0, 11.0, 64.0]), np.array([3.0, 1.0, 0.9, 0.95, 5.0])
    found_x, found_y = smooth(x, y)
    assert np.interp(x, found_x, found_y) == pytest.approx(y)
    assert found_y.min() == pytest.approx(0.9) and found_y.max() == pytest.approx(5.0)
    assert (np.diff(found_y[found_x <= x[2]]) <= 1e-12).all()
