"""`launch=print`: printed commands, which the user can start in another way."""

from collections.abc import Mapping, Sequence

from launch.sweeps.backends.base import run_command
from launch.sweeps.config import LaunchConfig
from launch.sweeps.directory import Job, Sweep
from trainer.shell.commands import typed_form


class Printed:
    """Backend that prints commands and starts no process."""

    def __init__(self, launch: LaunchConfig) -> None:
        """Store the settings."""
        self._launch = launch

    def check(self, device: str) -> None:
        """Accept every configuration, because no process is started."""

    def start(self, sweep: Sweep, jobs: Sequence[Job], allowed: Sequence[str]) -> bool:
        """Print the command of each job on one line; return False."""
        for job in jobs:
            print(typed_form(run_command(sweep.run_dir(job), self._launch, allowed)))
        return False

    def held(self, sweep: Sweep) -> Mapping[int, str]:
        """Return an empty mapping, because this backend has no queue and starts no job."""
        return {}
