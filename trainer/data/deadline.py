"""A deadline for the reading of one batch, so that data which never comes ends the run and names itself."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from trainer.errors import DataFailure

SHARE = 0.9
"""Share of `trainer.timeout_s` that a batch may take. The other ranks wait longer, and before they print anything they
leave a slow rank `trainer.distributed.failures.CAUSE_PATIENCE_S` more. So the rank with the cause prints it first."""


@contextmanager
def deadline(timeout_s: float) -> Iterator[None]:
    """Raise a DataFailure in the block when its time is over.

    Only the main thread can be interrupted. A block in another thread, or in a program that uses SIGALRM itself, has no
    deadline.

    Args:
        timeout_s: `trainer.timeout_s`; the block may take `SHARE` of it. 0 sets no deadline.

    Raises:
        DataFailure: The time is over.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not timeout_s or not in_main_thread or signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL:
        yield
        return

    def expire(number: int, frame: FrameType | None) -> None:
        raise DataFailure(
            f"data: no batch within {SHARE * timeout_s:g} s ({SHARE:.0%} of trainer.timeout_s):"
            " a DataLoader worker or the storage does not answer"
        )

    signal.signal(signal.SIGALRM, expire)
    try:
        signal.setitimer(signal.ITIMER_REAL, SHARE * timeout_s)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
