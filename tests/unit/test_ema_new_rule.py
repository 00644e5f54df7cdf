"""A new built-in rule is one function and one YAML; a setting of its own is a field with its check."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from ema import EMAConfig, ExponentialMovingAverage
from ema.rules import STEERED

ROOT = Path(__file__).resolve().parents[2]
PLAIN_MEAN = """

@built_in()
def mean(t: int, config: EMAConfig) -> float:
    return 1 / (t + 1)
"""
WINDOW = """

@built_in("window")
def recent(t: int, config: EMAConfig) -> float:
    return max(1 / config.window, 1 / (t + 1))
"""
PROGRAM = """
import sys
from ema.rules import profile
from trainer.config.averages import settle_averages
from trainer.config.compose import compose, to_config
from trainer.config.validate import reject_unused_overrides, validate
from trainer.errors import ConfigError
try:
    composed, overrides = compose(sys.argv[1:])
    config = to_config(composed)
    validate(config, 1)
    reject_unused_overrides(config, overrides)
    for name, average in settle_averages(config).items():
        print(name, *profile(average, 2))
except ConfigError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of `ema` and `conf` with two new rules, one of which has a setting of its own."""
    root = tmp_path_factory.mktemp("extended")
    for package in ("ema", "conf"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (root / "ema" / "rules.py").open("a") as file:
        file.write(PLAIN_MEAN + WINDOW)
    settings = root / "ema" / "config.py"
    with_field = settings.read_text().replace(
        "    def validate(self)", "    window: float = 4.0\n\n    def validate(self)", 1
    )
    settings.write_text(with_field + "CHECKS['window'] = _POSITIVE\n")
    (root / "conf" / "ema" / "mean.yaml").write_text("type: mean\n")
    (root / "conf" / "ema" / "recent.yaml").write_text("type: recent\n")
    return root


@pytest.mark.parametrize(
    ("overrides", "printed"),
    [
        (["ema=mean"], "mean 0.33333"),
        (["ema=recent", "ema.window=2.0"], "recent_2 0.25 0.25 0.5"),
        (["ema=recent", "ema.window=0.0"], "ema.window: expected a number above 0, got 0.0"),
        (["ema=mean", "ema.window=2.0"], "ema.window: read by ema.type recent only, and ema.type is mean"),
        (
            ["ema=mean", "ema.decay=0.9"],
            "ema.decay: read by ema.type constant and warmup and debiased and cosine only",
        ),
    ],
)
def test_a_new_rule_is_composed_checked_and_named(extended: Path, overrides: list[str], printed: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(extended), str(ROOT)])}
    command = [sys.executable, "-P", "-c", PROGRAM, *overrides]
    done = subprocess.run(command, env=environment, cwd=extended, capture_output=True, text=True, check=False)
    assert done.stdout.startswith(printed), done.stdout + done.stderr


@pytest.mark.parametrize("name", [field.name for field in fields(EMAConfig)])
def test_every_setting_has_a_check(name: str) -> None:
    with pytest.raises(ValueError, match=f"^EMAConfig.{name}: expected "):
        EMAConfig(**{name: object()}).validate()  # type: ignore[arg-type]


def test_the_settings_of_every_rule_are_saved_with_the_average() -> None:
    average = ExponentialMovingAverage(torch.nn.Linear(1, 1), EMAConfig())
    saved = json.loads(bytes(average.state_dict()["_ema.rule"].tolist()))
    assert set(STEERED) <= set(saved)
