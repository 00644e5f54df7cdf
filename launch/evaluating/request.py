"""The command line of `launch.evaluate`, read before torch is imported."""

from dataclasses import dataclass
from pathlib import Path

from trainer.config.schema import Config
from trainer.rundir.directory import RunDir


@dataclass(frozen=True)
class Request:
    """The arguments of `launch.evaluate` that are no overrides."""

    run_dir: Path
    step: str | int = "last"
    """`last`, `best` or a number of steps."""
    weights: tuple[str, ...] = ("*",)
    """Names and patterns."""
    out: Path | None = None


@dataclass(frozen=True)
class Setting:
    """The configuration of an evaluation."""

    run_dir: RunDir
    config: Config
    overrides: list[str]
    allowed: list[str]
    """Prefixes of `_target_` that this command line trusts, besides the built-in ones."""
