"""Signals: temporary handlers, commands that clean up before they end, and signals to a sweep's processes."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from trainer.cli import EXIT_SIGNAL
from trainer.errors import ConfigError
from trainer.shell.terminal import without_ignored_hangup

LEAVING = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a command as soon as it has cleaned up."""


@contextmanager
def handling(
    numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Handle the signals `numbers` with `handler` within the context; restore the earlier handlers at its end.

    SIGHUP stays ignored under `nohup`.
    """
    previous = {number: signal.signal(number, handler) for number in without_ignored_hangup(numbers)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def temporary_folder(folder: Path, unwritable: str) -> Iterator[Path]:
    """Make a folder for the context; it is removed at the end, also after an exception, SIGTERM or SIGHUP.

    Raises:
        ConfigError: The folder cannot be made; `unwritable` says what cannot be written then.
    """
    with handling(LEAVING, _leave):
        try:
            folder.mkdir()
        except OSError as error:
            raise ConfigError(f"{unwritable} cannot be written: {error.strerror}") from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _leave(number: int, frame: object) -> None:
    for other in LEAVING:  # a further signal must not interrupt the cleaning up
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(EXIT_SIGNAL + number)


def end_at_once(process: "subprocess.Popen[bytes]") -> None:
    """Kill a command and, if the command is torchrun, all its ranks; wait until it has ended."""
    if process.poll() is None:
        process.send_signal(signal.SIGSTOP)  # so that torchrun starts no further rank
        send_signal(process, signal.SIGKILL)
        process.kill()
    process.wait()


def send_signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    """Send a signal to a command or, if the command is torchrun, to all its ranks.

    After a second signal, torchrun exits while its ranks are still saving. The ranks count the signals themselves.
    """
    if process.poll() is None:
        for pid in _ranks(process.pid) or [process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _ranks(agent: int) -> list[int]:
    """Return the processes that a torchrun of this machine started."""
    try:
        children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes() for pid in children}
    except OSError:  # no /proc, or one of them has just ended
        return []
    return [pid for pid, found in environments.items() if b"\0RANK=" in b"\0" + found]
