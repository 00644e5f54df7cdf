"""The old place of the Slurm backend. Jobs that were queued before it moved are pickled by this name."""

from launch.sweeps.backends.slurm import Task as Task
