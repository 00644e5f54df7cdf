"""Former module of the Slurm backend, which pickles of jobs that were queued by earlier versions refer to."""

from launch.sweeps.backends.slurm import Task as Task
