"""The arithmetic of `python -m tests.findings`, on records that are made up."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.findings import digits, gpt
from tests.findings.runs import Runs, evaluated, spread
from trainer.config.compose import compose


class MadeUp(Runs):
    """Runs that are not trained: each has the losses that a function of its name and of the seed gives."""

    def train(self, name: str, *overrides: str) -> Path:
        path = self._folder / name
        path.mkdir(exist_ok=True)
        (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, self.records(name))))
        return path

    def records(self, name: str) -> list[dict[str, Any]]:
        seed = int(name[-1])
        if name.startswith("cooled"):
            return [{"train/step": 1200, "eval/live/loss": 1.0 + seed}]
        if name.startswith("batch-small"):
            return [{"train/step": 40 * k, "eval/ema/0.99/loss": 1.0} for k in range(1, 26)]
        if name.startswith("batch-large"):
            steps = range(10, 251, 10)
            return [
                {"train/step": s, "eval/ema/0.960596/loss": 1.0, "eval/ema/0.99/loss": 1.5} for s in steps
            ]
        return [{"train/step": 1200, "train/loss": 0.0}]

    def made(self, run: Path, *profiles: str) -> dict[str, float]:
        seed, steps = int(run.name[-1]), profiles[-1].removeprefix("window=")
        merged = {"live": 2.0, f"linear {steps}": 1.2, f"minus_sqrt {steps}": 1.5, "ema/power_sigma0.05": 0.9}
        return {name: loss + seed for name, loss in merged.items()}


def test_the_share_is_that_of_the_gain_of_the_cool_down(tmp_path: Path) -> None:
    rows = list(gpt.merging(MadeUp(tmp_path), [0, 1]))
    assert len(rows) == len(gpt.RATES) * len(gpt.WINDOWS)
    assert rows[0] == (
        "rate 0.001, last 10%",
        "linear 80 ± 0 % (0.2000 ± 0.0000 above); minus_sqrt 50 ± 0 % (0.5000 ± 0.0000 above); "
        "width 0.05 110 ± 0 % (-0.1000 ± 0.0000 above)",
    )


def test_batches_are_compared_after_equal_samples(tmp_path: Path) -> None:
    scaled, unscaled = digits.batch(MadeUp(tmp_path), [0])
    assert scaled[1] == "loss apart by 0.0000 of the small batch"
    assert unscaled[1] == "loss apart by 0.5000 of the small batch"


def test_the_best_width_is_the_minimum_of_a_parabola_and_stays_in_the_range() -> None:
    from math import log

    widths = gpt.WIDTHS
    assert gpt.optimum(widths, [(log(w) - log(0.06)) ** 2 for w in widths]) == pytest.approx(0.06)
    assert gpt.optimum(widths, list(range(len(widths)))) == widths[0]
    assert gpt.optimum(widths, list(range(len(widths), 0, -1))) == widths[-1]


def test_a_value_is_read_at_each_evaluated_step_and_the_spread_is_that_of_the_seeds(tmp_path: Path) -> None:
    run = MadeUp(tmp_path).train("cooled-0.001-0.1-2", "fork=x")
    assert evaluated(run, "live") == {1200: 3.0} and evaluated(run, "ema/0.9") == {}
    assert spread([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0" and spread([0.5], 2) == "0.50"


def test_every_kind_of_run_has_a_valid_configuration(tmp_path: Path) -> None:
    composed: set[str] = set()

    class Composed(MadeUp):
        def train(self, name: str, *overrides: str) -> Path:
            kind = name.split("-")[0]
            if kind not in composed and not overrides[0].startswith("fork="):
                compose(list(overrides))
            composed.add(kind)
            return super().train(name, *overrides)

        def records(self, name: str) -> list[dict[str, Any]]:
            values = {"live/loss": 1.0, "live/accuracy": 0.9, "ema/0.99/accuracy": 0.9}
            values |= {"ema/power_sigma0.05/loss": 1.0, "ema/fraction_0.05/loss": 1.0}
            evaluated = {f"eval/{key}": value for key, value in values.items()}
            return [*super().records(name), *({"train/step": s} | evaluated for s in (400, 800, 1000, 1200))]

    runs = Composed(tmp_path)
    for finding in (gpt.merging, gpt.cosine, digits.batch, digits.noise):
        list(finding(runs, [0]))
    assert composed == {"constant", "cooled", "cosine", "inverse", "batch", "noise"}
