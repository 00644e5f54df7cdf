"""The picture over the setting that differs: when it is drawn, and what is on its axes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.simulated import run_of
from tests.unit.test_answers import NOISY, SLOW
from trainer.report.comparison import combine
from trainer.report.pictures import setting_plot
from trainer.report.runs import Run

MADE = setting_plot.save


def drawn(monkeypatch: pytest.MonkeyPatch, path: Path, runs: list[Run]) -> Figure | None:
    """The figure, which is also written to `path`; None if there is none."""
    figures: list[Figure] = []

    def save(path: Path, draw: Callable[[Figure], None], *, height: float) -> str:
        def kept(figure: Figure) -> None:
            figures.append(figure)
            draw(figure)

        return MADE(path, kept, height=height)

    monkeypatch.setattr(setting_plot, "save", save)
    comparison = combine(runs, "loss")
    assert comparison is not None
    averages = list(dict.fromkeys(name for group in comparison.groups for name in group.averages))
    svg = setting_plot.draw_over_setting(comparison, path, averages)
    assert (svg is not None) == bool(figures) == path.exists()
    return figures[0] if figures else None


def with_setting(**settings: list[str]) -> list[Run]:
    """Two runs for each place of the settings, the average better by 0.1."""
    runs = []
    for place in range(len(next(iter(settings.values())))):
        own = {key.replace("__", "."): values[place] for key, values in settings.items()}
        for seed in range(2):
            live = 1 + 0.1 * place + 0.01 * seed
            runs.append(run_of(live, np.array([live - 0.1]), None, seed, **own))
    return runs


def test_live_and_the_best_average_of_each_rate_are_drawn_on_a_log_axis(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figure = drawn(monkeypatch, tmp_path / "a.png", [*NOISY, *SLOW])
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_xscale() == "log" and axes.get_xlabel().startswith("optimizer.lr\n")
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.0005", "0.005"]
    _, labels = axes.get_legend_handles_labels()
    assert labels == ["live", "best average: EMA 0.9", "best average: EMA 0.97"]
    lines = [list(map(float, line.get_ydata())) for line in axes.get_lines()]  # type: ignore[arg-type]
    means = [pytest.approx(own, abs=1e-9) for own in ([1.05, 0.935 / 3], [3.22 / 3, 0.31 / 3])]
    assert all(mean in lines for mean in means)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"model__width": ["64", "128", "256"]}, "linear"),
        ({"model__width": ["16", "64", "256"]}, "log"),
        ({"model__dropout": ["0", "0.1", "0.9"]}, "linear"),
        ({"optimizer__name": ["adamw", "sgd"]}, None),
        ({"optimizer__lr": ["0.1", "0.2"], "model__width": ["16", "32"]}, None),
    ],
)
def test_one_numeric_setting_is_drawn_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, list[str]], scale: str | None
) -> None:
    figure = drawn(monkeypatch, tmp_path / "a.png", with_setting(**settings))
    assert (figure.axes[0].get_xscale() if figure else None) == scale
