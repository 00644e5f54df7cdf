"""`launch=print`: the commands, for other hands to start."""

from collections.abc import Mapping, Sequence

from launch.sweeps.backends.base import run_command, shown
from launch.sweeps.config import LaunchConfig
from launch.sweeps.directory import Job, Sweep


class Printed:
    """Starts nothing."""

    def __init__(self, launch: LaunchConfig) -> None:
        """Take the settings."""
        self._launch = launch

    def check(self, device: str) -> None:
        """Any machine will do."""

    def start(self, sweep: Sweep, jobs: Sequence[Job], allowed: Sequence[str]) -> bool:
        """Print one line a job."""
        for job in jobs:
            print(shown(run_command(sweep.run_dir(job), self._launch, allowed)))
        return False

    def held(self, sweep: Sweep) -> Mapping[int, str]:
        """Nothing is in hand."""
        return {}
