"""Parsed command line of `launch.evaluate`. No torch here: bad arguments are refused before it is imported."""

from dataclasses import dataclass
from pathlib import Path

from ema.config import EMAConfig
from trainer.config.schema import Config
from trainer.rundir.directory import RunDir


@dataclass(frozen=True)
class Request:
    """Arguments of `launch.evaluate` other than configuration overrides."""

    run_dir: Path
    step: str | int = "last"
    """`last`, `best` or a number of steps."""
    weights: tuple[str, ...] = ("*",)
    """Names and patterns of the weights to evaluate."""
    out: Path | None = None
    """File for the result; None chooses a new one in the run's `evaluations/`."""


@dataclass(frozen=True)
class Setting:
    """Configuration of an evaluation."""

    run_dir: RunDir
    config: Config
    averages: dict[str, EMAConfig]
    """Settings of the run's averages by name."""
    overrides: list[str]
    """Changes to the run's configuration, as typed."""
    allowed: list[str]
    """Prefixes of `_target_` that this command line trusts, in addition to the built-in ones."""
