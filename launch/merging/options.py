"""Parsed command line of `launch.merge`. No torch here: bad arguments are refused before it is imported."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from ema.config import CHECKS, EMAConfig
from launch.evaluating.request import Setting
from launch.exporting.files import Destination
from launch.merging.order import Snapshot
from trainer.errors import ConfigError

AVERAGES: dict[str, Callable[[float], EMAConfig]] = {
    "decay": lambda value: EMAConfig(decay=value),
    "halflife": lambda value: EMAConfig(type="halflife", halflife_kimg=value / 1000, rampup_ratio=None),
    "power": lambda value: EMAConfig(type="power", sigma_rel=value),
    "fraction": lambda value: EMAConfig(type="fraction", halflife_fraction=value),
}
"""Rules of averages that a combination of checkpoints can come close to, each with its setting; half-lives are in
steps."""


@dataclass(frozen=True)
class Options:
    """Arguments of `launch.merge`."""

    snapshots: list[Snapshot]
    """Sources to merge, the newest last."""
    profile: str
    """Text of `profile=`; empty if there are coefficients."""
    coefficients: list[float] | None
    """Coefficient of each source, with sum 1; None if there is a profile."""
    out: Destination
    max_shard_bytes: int
    """Largest size of a file in bytes, at least 1."""
    evaluated: Setting | None
    """Configuration of the run on whose data the result is evaluated; None evaluates nothing."""


def average_of(rule: str, value: str, key: str) -> EMAConfig:
    """Return the settings of an average whose profile is wanted, by a rule in AVERAGES; messages begin with `key`.

    Raises:
        ConfigError: The value is no setting of the rule.
    """
    try:
        number = float(value)
    except ValueError:
        raise ConfigError(f"{key}: expected a number, got {value[:300] or 'nothing'}") from None
    config = AVERAGES[rule](number)
    for name, (holds, expected) in CHECKS.items():  # the field may have another name than what was typed
        if not holds(getattr(config, name)):
            raise ConfigError(f"{key}: expected {expected.removesuffix(', or None')}, got {value[:300]}")
    return config


def parse_coefficients(text: str) -> list[float]:
    """Return the value of `coefficients=`, a list of numbers with sum 1.

    Raises:
        ConfigError: The value is no such list.
    """
    match = re.fullmatch(r"\[([^][]*)\]", text.strip())
    try:
        numbers = [float(item) for item in match[1].split(",")] if match else []
    except ValueError:
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ConfigError(f"coefficients: expected numbers as in [0.25,0.75], got {text[:300] or 'nothing'}")
    if abs(math.fsum(numbers) - 1) > 1e-6:
        raise ConfigError(f"coefficients: expected sum 1, got {math.fsum(numbers):.8g}")
    return numbers
