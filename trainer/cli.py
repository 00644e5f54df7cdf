"""Run a command that may have several processes, and print bad input as one line.

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

    torch and its dependencies make 300,000 objects that live as long as the process. Without the pause Python searches
    them for garbage during the imports and again at the end, which takes a quarter of the time of a short run.
    """
    if "torch" in sys.modules or not gc.isenabled():  # the calling program controls garbage collection
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
    """Call `work` and return its exit code; after a ConfigError print one line and return 2."""
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
