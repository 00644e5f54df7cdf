"""The frame of a command that may run in several processes: one line for bad input, whoever finds it and when.

Nothing here imports torch before `work` does.
"""

import atexit
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainer.distributed.torchrun import complain, launched_rank, launched_world_size
from trainer.errors import EXIT_BAD_INPUT, ConfigError


@contextmanager
def importing() -> Iterator[None]:
    """Context of the imports that take a second or more.

    What torch and all on it make, 300,000 objects, lives as long as the process. Python would search them
    for garbage again and again while they are made, and once more at its end: a quarter of all that a short run
    costs.
    """
    if "torch" in sys.modules or not gc.isenabled():  # called by a program that has its own ways
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.freeze)


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
            from trainer.distributed.processes import leave_together

            if not leave_together() and rank:  # it is this rank's alone
                complain(error)
        return EXIT_BAD_INPUT
