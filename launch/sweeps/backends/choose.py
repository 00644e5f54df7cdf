"""The choice of a backend by `launch.name`. Only the chosen one is imported."""

from collections.abc import Mapping
from importlib import import_module

from launch.sweeps.backends.base import Backend
from launch.sweeps.config import LaunchConfig
from launch.sweeps.directory import Sweep
from trainer.errors import ConfigError

BACKENDS = {
    "local": "launch.sweeps.backends.local.Local",
    "print": "launch.sweeps.backends.printed.Printed",
    "slurm": "launch.sweeps.backends.slurm.Slurm",
}


def make_backend(launch: LaunchConfig) -> Backend:
    """Make the backend that `launch.name` names; `check_launch` has validated the name."""
    module, _, name = BACKENDS[launch.name].rpartition(".")
    backend: Backend = getattr(import_module(module), name)(launch)
    return backend


def check_change(sweep: Sweep, launch: LaunchConfig, held: Mapping[int, str]) -> None:
    """Check that no other backend than that of `launch` has jobs of the sweep, which `launch` could not see.

    `held` has the jobs that are queued or running in the recorded backend, which started them.

    Raises:
        ConfigError: Another backend has jobs.
    """
    started = sweep.launch_config().name
    if held and launch.name not in (started, "print"):
        raise ConfigError(f"launch: {started} still has {len(held)} runs queued or running; wait for them")
