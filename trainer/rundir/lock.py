"""Who works in a run directory: one run at a time, wherever it was started."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from trainer.distributed.torchrun import is_alive, own_agent
from trainer.errors import ConfigError
from trainer.rundir.files import open_own

LOCK = "run.lock"
PATIENCE_S = 10.0
"""A run that was told to stop a moment ago is given the time to leave."""
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def hold(run_dir: Path, patience_s: float) -> Iterator[bool]:
    """Hold a run directory and write into its lock who does.

    A POSIX record lock: children do not inherit it, the kernel drops it with its process, and NFS keeps it between
    machines.

    Args:
        run_dir: that exists.
        patience_s: seconds to wait for a holder that is about to leave.

    Yields:
        Whether the file system has such locks; without them nothing holds anybody off.

    Raises:
        ConfigError: another process holds it, or it cannot be written.
    """
    try:
        descriptor = open_own(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    except OSError as error:
        raise ConfigError(f"resume: {run_dir} cannot be written: {error.strerror}") from error
    with os.fdopen(descriptor, "a+", encoding="utf-8") as file:
        has_locks = _lock(file, run_dir, patience_s)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n{own_agent() or ''}\n")
        file.flush()
        yield has_locks


def _lock(file: TextIO, run_dir: Path, patience_s: float) -> bool:
    until = time.monotonic() + patience_s
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):  # POSIX allows for either
            if time.monotonic() >= until:
                file.seek(0)
                holder = file.readline().strip() or "another process"
                raise ConfigError(
                    f"resume: {run_dir} is in use by {holder}; wait for it, or stop it"
                ) from None
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return False


def held_by(run_dir: Path) -> str | None:
    """The process that works in a run directory (`hold`), as `process 12 on HOST`; None if none does.

    Not for that process itself: who closes the file gives up its own lock (fcntl(2)).
    """
    try:
        descriptor = open_own(run_dir / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, encoding="utf-8", errors="replace") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            told = file.readline()[:200].strip()
            return told if told.isprintable() and told else "a process"
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
    return None


def torchrun_of(run_dir: Path) -> str | None:
    """The torchrun whose ranks were the last to work in a run directory, as `process 12 on HOST`, if it lives here.

    It outlives them: while it restarts them nobody holds the directory.
    """
    try:
        descriptor = open_own(run_dir / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, encoding="utf-8", errors="replace") as file:
        _, _, agent = file.read(1000).strip().partition("\n")
    host, _, pid = agent.rpartition(":")[0].partition(":")
    return f"process {pid} on {host}" if is_alive(agent) else None
