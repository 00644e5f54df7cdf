"""`launch=print`: printed commands or manifests, which the user can start in another way."""

from collections.abc import Mapping, Sequence

from launch.sweeps.backends.base import resuming, run_command
from launch.sweeps.backends.manifests import check_manifest, manifest
from launch.sweeps.config import LaunchConfig
from launch.sweeps.directory import Job, Sweep
from trainer.shell.commands import typed_form


class Printed:
    """Backend that prints commands or manifests and starts no process."""

    def __init__(self, launch: LaunchConfig) -> None:
        """Store the settings."""
        self._launch = launch
        self._device = "auto"

    def check(self, device: str) -> None:
        """Accept every configuration, because no process is started; store the device."""
        self._device = device

    def start(self, sweep: Sweep, jobs: Sequence[Job], allowed: Sequence[str]) -> bool:
        """Print the command of each job on one line, or its manifest; return False."""
        if self._launch.format != "command":
            check_manifest(self._launch, self._device, str(sweep.path))
        for job in jobs:
            place = sweep.run_dir(job)
            if self._launch.format == "command":
                print(typed_form(run_command(place, self._launch, allowed)))
            else:
                name, again = f"{sweep.path.name}-{job.number}", resuming(str(place), allowed)
                print("---\n" + manifest(self._launch, self._device, name, str(place), [], again), end="")
        return False

    def held(self, sweep: Sweep) -> Mapping[int, str]:
        """Return an empty mapping, because this backend has no queue and starts no job."""
        return {}
