"""What an export is told. No torch here: the command line is read before torch is imported."""

from dataclasses import dataclass

from launch.exporting.files import Destination
from trainer.rundir.directory import RunDir


@dataclass(frozen=True)
class Options:
    """What is exported, and how; names are not looked up yet."""

    run_dir: RunDir
    weights: str
    out: Destination
    step: str | int
    """`last`, `best` or a number of steps."""
    dtype: str
    max_shard_bytes: int
    allowed: list[str]
