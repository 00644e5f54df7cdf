"""A terminal may close while a command runs: its output then goes nowhere, and its hang-up asks a run to stop.

The reader of a pipe may end first, as in `| head`, or in `| tee` after Ctrl-C. A connection by ssh may be lost. Then a
write fails, and without this module the exception would end a run unsaved, or a sweep without its runs.
"""

import errno
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
"""Signals that ask a run to save and to stop."""
PATIENT_SIGNALS = (signal.SIGHUP, signal.SIGUSR2)
"""Signals that never mean "at once": the kernel and a shell, or a scheduler and torchrun, may both send them."""


def without_ignored_hangup(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Return the signals to handle: without SIGHUP if it is ignored, because the user typed `nohup`."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in numbers if number != signal.SIGHUP or not is_ignored]


@contextmanager
def interrupted_at_once() -> Iterator[None]:
    """Context in which Ctrl-C prints a line and ends this process by SIGINT; for work that leaves nothing half-made.

    Python would raise a KeyboardInterrupt. In an import or in a call from C++ it may be lost, so that the command goes
    on, or become another error. A handler that was set before stays. For processes that are one command: nothing that
    waits for the end of Python is done.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with suppress(OSError):  # the reader of the output may have been interrupted first
            os.write(2, b"interrupted\n")  # print could be what is interrupted
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is end:  # else an imported package has set its own
            signal.signal(signal.SIGINT, signal.default_int_handler)


class _Outlet(io.FileIO):
    """Bytes of standard output or standard error; a write that fails is dropped and raises nothing."""

    def write(self, data: Any) -> int:
        """Write all bytes; after a failure that will last, redirect the descriptor to the null device."""
        left = memoryview(data).cast("B")
        size = len(left)
        while left:
            try:
                written = super().write(left)
            except OSError as error:
                # A full disk may have room again. Other faults last; programs started later must not fail by them.
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    null = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(null, self.fileno())
                    os.close(null)
                break
            if written is None:  # another program made the pipe non-blocking, and it is full
                select.select([], [self.fileno()], [])
            else:
                left = left[written:]
        return size


def outlive_terminal() -> None:
    """Replace the standard streams of this program by ones that drop what can no longer be written.

    A stream that the calling program has replaced is left as it is. A stream that was closed at the start (`>&-`)
    becomes the null device; otherwise the next file to be opened would get its number, and with it foreign output.
    """
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115 - open until the end
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
        elif (
            name != "stdin" and stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper)
        ):
            setattr(sys, name, _outliving(stream))


def _outliving(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    outlet = _Outlet(stream.fileno(), "w", closefd=False)
    is_buffered = isinstance(stream.buffer, io.BufferedWriter)  # false for python -u
    return io.TextIOWrapper(
        io.BufferedWriter(outlet) if is_buffered else outlet,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
