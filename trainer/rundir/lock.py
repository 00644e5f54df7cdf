"""Locks: one session at a time works in a run directory, and one driver in a sweep.

A run holds a POSIX record lock. Its children do not inherit the lock, and NFS enforces it between machines. An attempt
and a driver of a sweep hold a BSD lock (`flock`). Their children inherit the lock, so it lasts as long as one of them.
"""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from trainer.distributed.torchrun import is_alive, own_agent
from trainer.errors import ConfigError
from trainer.rundir.files import open_own
from trainer.shell.printable import print_text

LOCK = "run.lock"
PATIENCE_S = 10.0
"""Seconds to wait for a run that is about to stop."""
NOTICE_S = 2.0
"""Seconds of waiting after which a line names the holder."""
RETRY_S = 0.02
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def hold(run_dir: Path, patience_s: float, key: str) -> Iterator[bool]:
    """Hold the lock of a run directory, and write this process's name into the lock file.

    A holder that is about to leave is waited for, up to `patience_s` seconds. `key` begins the messages.

    Yields:
        Whether the file system has such locks. Without them a second run is not kept out.

    Raises:
        ConfigError: Another process holds the lock, or the lock file cannot be written.
    """
    try:
        descriptor = open_own(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    except OSError as error:
        raise ConfigError(f"{key}: {run_dir} cannot be written: {error.strerror}") from error
    with os.fdopen(descriptor, "a+", encoding="utf-8") as file:
        has_locks = _lock(file, run_dir, patience_s, key)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n{own_agent() or ''}\n")
        file.flush()
        yield has_locks


def _lock(file: TextIO, run_dir: Path, patience_s: float, key: str) -> bool:
    """Take the record lock; return False if the file system has no locks."""

    def notice() -> None:
        rest = f"waiting up to {patience_s - NOTICE_S:.0f} s for it to stop"
        print_text(f"{run_dir} is in use by {_holder(file)}; {rest}", error=True)

    try:
        taken = _within(patience_s, lambda: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB), notice)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    if not taken:
        raise ConfigError(f"{key}: {run_dir} is in use by {_holder(file)}; wait for it, or stop it")
    return True


def _holder(file: TextIO) -> str:
    """Return the process that wrote its name into the lock file, as `process 12 on HOST`."""
    file.seek(0)
    return file.readline(200).strip() or "another process"


def _within(patience_s: float, take: Callable[[], None], notice: Callable[[], None] | None = None) -> bool:
    """Try to take a lock until it succeeds or the time is over; return whether it succeeded.

    After NOTICE_S seconds `notice` is called once.
    """
    until = time.monotonic() + patience_s
    while True:
        try:
            take()
            return True
        except (BlockingIOError, PermissionError):  # POSIX allows either
            rest = until - time.monotonic()
            if rest <= 0:
                return False
            if notice is not None and rest <= patience_s - NOTICE_S:
                notice()
                notice = None
            time.sleep(RETRY_S)


def take_file_lock(path: Path, patience_s: float = 0.0) -> int | None:
    """Lock a file and return its descriptor, which children may inherit; None if it is locked already."""
    descriptor = open_own(path, os.O_RDWR | os.O_CREAT)
    if _within(patience_s, lambda: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)):
        return descriptor
    os.close(descriptor)
    return None


def _opened(path: Path) -> TextIO | None:
    """Open a lock file for reading; return None if there is no such file.

    Raises:
        ConfigError: The file cannot be read, so whether it is locked cannot be found out.
    """
    try:
        return os.fdopen(open_own(path, os.O_RDONLY), encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from error


def is_file_locked(path: Path) -> bool:
    """Return whether a process of this machine holds a lock by `take_file_lock`."""
    if (file := _opened(path)) is None:
        return False
    with file:
        try:
            # A shared lock, so that two such checks at the same time both succeed.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def held_by(run_dir: Path) -> str | None:
    """Return the process that holds a run directory (`hold`), as `process 12 on HOST`, else None.

    The holder itself must not call this: closing the file would release its own lock (fcntl(2)).
    """
    if (file := _opened(run_dir / LOCK)) is None:
        return None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = file.readline(200).strip()
            return holder if holder.isprintable() and holder else "a process"
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
    return None


def torchrun_of(run_dir: Path) -> str | None:
    """Return the torchrun process whose ranks last used a run directory, as `process 12 on HOST`.

    The result is None unless that process is alive on this machine. While torchrun restarts its ranks, it is alive but
    no process holds the directory.
    """
    if (file := _opened(run_dir / LOCK)) is None:
        return None
    with file:
        _, _, agent = file.read(1000).strip().partition("\n")
    host, _, pid = agent.rpartition(":")[0].partition(":")
    return f"process {pid} on {host}" if is_alive(agent) else None
