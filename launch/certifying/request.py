"""Parsed command line of `launch.certify`. No torch here: bad arguments are refused before it is imported."""

from dataclasses import dataclass

from launch.evaluating.request import Setting

STEPS = 4
"""Steps of the short runs, by default."""
TOLERANCE = 1e-5
"""Largest difference between sharded and unsharded weights, by default, relative to the largest change of a weight."""


@dataclass(frozen=True)
class Request:
    """Arguments of `launch.certify`."""

    setting: Setting
    """The run and the configuration of its last session."""
    steps: int = STEPS
    """Steps of each short run, at least 2."""
    tolerance: float = TOLERANCE
    """Largest difference of the row `sharded = unsharded`."""
