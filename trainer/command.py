"""The frame of a command that may run in several processes: one line for bad input, whoever finds it and when.

Nothing here imports torch before `work` does.
"""

import os
from collections.abc import Callable

from trainer.config import ConfigError
from trainer.distributed_env import complain, launched_rank, launched_world_size


def run_command(work: Callable[[], int]) -> int:
    """Do the work of this process and return its exit code: 2 after a ConfigError that was raised before it joined."""
    # OpenMP's threads spin while they wait: a step on two idle cores is a quarter faster for it, and six times slower
    # as soon as another program wants a core too. Read when torch is imported, so it is set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return work()
    except ConfigError as error:
        rank = launched_rank()
        if rank == 0:
            complain(error)
        if launched_world_size() > 1:
            from trainer.distributed import leave_together

            if not leave_together() and rank:  # it is this rank's alone
                complain(error)
        return 2
