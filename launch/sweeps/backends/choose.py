"""The choice of a backend by `launch.name`. Only the chosen one is imported."""

from importlib import import_module

from launch.sweeps.backends.base import Backend
from launch.sweeps.config import LaunchConfig

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
