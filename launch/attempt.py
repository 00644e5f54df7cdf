"""`python -m launch.attempt RUN_DIR COMMAND…`: one attempt at a run, on record in its directory.

Whoever started it may die: what a run came to is written by the process beside it. `attempts.json` gets an entry when
the command starts and its exit code when it ends; `output.log` all that it prints. The lock on `attempt.lock` is
inherited by the command and held by the kernel for as long as either lives, so it says whether a run goes on, and no
two attempts meet in one directory.
"""

import datetime
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType

from trainer.config import ConfigError
from trainer.files import write_atomically

ATTEMPTS = "attempts.json"
LOCK = "attempt.lock"
LOG = "output.log"

EXIT_STOPPED = 75
"""Of the trainer: stopped by a signal after saving."""
EXIT_TAKEN = 73
"""Of this command: another process works in the directory."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
LOCK_PATIENCE_S = 2.0

_ERROR = re.compile(r"error: (.+)")
_EXCEPTION = re.compile(
    r"(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt|NonFiniteStep|Warning)\b(?!Error).*)"
)
_LOG_TAIL_BYTES = 1 << 18


@dataclass
class Attempt:
    """One start of a run's command."""

    host: str
    pid: int
    """Of the process that keeps this record and passes signals on to the command."""
    started: str
    ended: str | None = None
    exit_code: int | None = None
    """As a shell gives it: 128 + n after signal n. None while the command runs, and for ever if the record's keeper was
    killed."""
    stopped: bool = False
    """Whether it was told to stop, by a signal to the keeper."""
    error: str | None = None
    """The line of its output that says why it failed."""


def now() -> str:
    """The time for a record, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read_attempts(run_dir: Path) -> list[Attempt]:
    """All attempts so far, oldest first.

    Raises:
        ConfigError: the record is damaged.
    """
    path = run_dir / ATTEMPTS
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(Attempt)}
        return [Attempt(**{key: value for key, value in entry.items() if key in known}) for entry in entries]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: expected the record of a run's attempts ({error})") from error


def _write(run_dir: Path, attempts: Sequence[Attempt]) -> None:
    write_atomically(
        run_dir / ATTEMPTS, json.dumps([asdict(attempt) for attempt in attempts], indent=2) + "\n"
    )


def try_lock(path: Path, patience_s: float = 0.0) -> int | None:
    """Take a lock file for this process and those it passes the descriptor to; None if somebody else has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    until = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                os.close(descriptor)
                return None
            time.sleep(0.02)
        else:
            return descriptor


def is_held(path: Path) -> bool:
    """Whether a process of this machine holds that lock file; those who only ask do not get into each other's way."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def _stop_signals(received: list[int], child: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in child:
            # Always the one that torchrun passes on to its ranks, too.
            process.send_signal(signal.SIGTERM)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def attempt(run_dir: Path, command: Sequence[str]) -> int:
    """Run the command to its end, on record; returns its exit code, or `EXIT_TAKEN` if the directory is in use."""
    received: list[int] = []
    child: list[subprocess.Popen[bytes]] = []
    with _stop_signals(received, child):
        descriptor = try_lock(run_dir / LOCK, LOCK_PATIENCE_S)
        if descriptor is None:
            return EXIT_TAKEN
        try:
            return _on_record(run_dir, command, descriptor, received, child)
        finally:
            os.close(descriptor)


def _on_record(
    run_dir: Path,
    command: Sequence[str],
    descriptor: int,
    received: list[int],
    child: list[subprocess.Popen[bytes]],
) -> int:
    attempts = [*read_attempts(run_dir), Attempt(socket.gethostname(), os.getpid(), now())]
    record = attempts[-1]
    _write(run_dir, attempts)
    with (run_dir / LOG).open("ab") as log:
        begin = log.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[descriptor],
            start_new_session=True,  # a signal to our group reaches it once, through us
        )
    child.append(process)
    for number in received:  # those that came before there was anybody to pass them on to
        process.send_signal(number)
    code = process.wait()
    record.exit_code = code if code >= 0 else 128 - code
    record.ended, record.stopped = now(), bool(received)
    if record.exit_code:
        record.error = _last_error(run_dir / LOG, begin) or f"exit code {record.exit_code}"
        if code < 0 and not received:
            record.error = f"killed by {signal.Signals(-code).name}"
    _write(run_dir, attempts)
    return record.exit_code


def _last_error(log: Path, begin: int) -> str | None:
    """The line that says why: the trainer's own word, else an exception's, else the last."""
    with log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - _LOG_TAIL_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    for pattern in (_ERROR, _EXCEPTION):
        found = [match[1] for line in lines if (match := pattern.match(line))]
        # torchrun's own exception only says that a rank had one.
        found = [line for line in found if "ChildFailedError" not in line]
        if found:
            return found[-1][:500]
    return lines[-1][:500] if lines else None


if __name__ == "__main__":
    sys.exit(attempt(Path(sys.argv[1]), sys.argv[2:]))
