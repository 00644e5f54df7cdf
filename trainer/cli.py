"""The frame of a command that may run in several processes: it prints one line for bad input, on whichever rank.

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
    """Pause garbage collection during imports that take a second or more.

    The 300,000 objects that torch and its dependents make live as long as the process. Python would search them
    for garbage again and again while they are made, and once more at its end: a quarter of the time of a short run.
    """
    if "torch" in sys.modules or not gc.isenabled():  # the calling program manages its own garbage
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
    # By default OpenMP's threads spin while they wait. That makes a step on two idle cores a quarter faster, and six
    # times slower when another program needs a core too. torch reads this variable when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return work()
    except ConfigError as error:
        rank = launched_rank()
        if rank == 0:
            complain(error)
        if launched_world_size() > 1:
            from trainer.distributed.processes import leave_together

            if not leave_together() and rank:  # only this rank has the error
                complain(error)
        return EXIT_BAD_INPUT
