"""Parsed command line of `launch.export`. No torch here: bad arguments are refused before it is imported."""

from dataclasses import dataclass

from launch.exporting.files import Destination
from trainer.rundir.directory import RunDir


@dataclass(frozen=True)
class Options:
    """Arguments of `launch.export`."""

    run_dir: RunDir
    weights: str
    """Name or pattern that must match the live weights or one average."""
    out: Destination
    step: str | int
    """`last`, `best` or a number of steps."""
    dtype: str
    """Type of floating-point tensors: `stored`, `float32`, `bfloat16` or `float16`."""
    max_shard_bytes: int
    """Largest size of a file in bytes, at least 1."""
    merged: bool
    """Whether the adapters of a model of peft are merged into the base model."""
    allowed: list[str]
    """Prefixes of `_target_` that this command line trusts, in addition to the built-in ones."""
