"""`python -m launch.sweeps.attempt RUN_DIR COMMAND…`: one attempt at a run, on record in its directory.

Whoever started it may die: what a run came to is written by the process beside it. `attempts.json` gets an entry when
the command starts and its exit code when it ends; `output.log` all that it prints. The lock on `attempt.lock` is
inherited by the command and held by the kernel for as long as either lives, so it says whether a run goes on, and no
two attempts meet in one directory.
"""

import datetime
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
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from launch.sweeps.record import read_record
from launch.sweeps.signals import handling, send_signal
from trainer.distributed.torchrun import RESTARTS, process_start
from trainer.errors import ConfigError
from trainer.rundir.files import open_own, read_json, write_atomically
from trainer.rundir.lock import held_by, is_file_locked, take_file_lock

ATTEMPTS = "attempts.json"
LOCK = "attempt.lock"
LOG = "output.log"

EXIT_TAKEN = 73
"""Of this command: another process works in the directory."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
LOCK_PATIENCE_S = 2.0
REPEAT_AFTER_S = 1.0
"""A further SIGTERM or SIGINT after this time is a user who will not wait for the save."""

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
    pid_started: int | None = None
    """When that process began, as the kernel counts: another one may be given its number after it."""


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
        entries = read_json(path)
        if not isinstance(entries, list):
            raise TypeError(f"expected a list, got {entries!r}")
        return [read_record(Attempt, entry) for entry in entries]
    except FileNotFoundError:
        return []
    except (OSError, ConfigError, TypeError) as error:
        raise ConfigError(f"{path}: expected the record of a run's attempts ({error})") from error


def running_on(run_dir: Path) -> str | None:
    """The machine on which a run goes on; None if it does nowhere.

    On this one somebody holds a lock: of an attempt, or of a run that was started by hand. On others the record of the
    last attempt has no end.
    """
    if is_file_locked(run_dir / LOCK) or held_by(run_dir):
        return socket.gethostname()
    try:
        attempts = read_attempts(run_dir)
    except ConfigError:  # `Sweep.observe` tells of it
        return None
    goes_on = attempts and attempts[-1].ended is None and attempts[-1].host != socket.gethostname()
    return attempts[-1].host if goes_on else None


def end_on_gone_host(run_dir: Path) -> None:
    """Record that the last attempt has ended, because the machine on which it ran is gone."""
    attempts = read_attempts(run_dir)
    attempts[-1].ended, attempts[-1].error = now(), f"its machine {attempts[-1].host} is gone"
    _write(run_dir, attempts)


def keeper(run_dir: Path) -> int | None:
    """The process on this machine that passes signals on to the attempt that goes on; None if it is gone."""
    attempts = read_attempts(run_dir)
    if not attempts or attempts[-1].host != socket.gethostname():
        return None
    last = attempts[-1]
    return (
        last.pid if last.ended is None and process_start(last.pid) == last.pid_started is not None else None
    )


def _write(run_dir: Path, attempts: Sequence[Attempt]) -> None:
    write_atomically(
        run_dir / ATTEMPTS, json.dumps([asdict(attempt) for attempt in attempts], indent=2) + "\n"
    )


@contextmanager
def _stop_signals(received: list[int], child: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    first_at = 0.0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal first_at
        now_s = time.monotonic()
        if not received:
            first_at = now_s
        # A scheduler and torchrun may both send it, so SIGUSR2 never counts as the second request to stop.
        again = number != signal.SIGUSR2 and bool(received) and now_s - first_at >= REPEAT_AFTER_S
        received.append(number)
        for process in child:
            send_signal(process, signal.SIGTERM if again else signal.SIGUSR2)

    with handling(FORWARDED, forward):
        yield


def attempt(run_dir: Path, command: Sequence[str]) -> int:
    """Run the command to its end, on record; returns its exit code, or `EXIT_TAKEN` if the directory is in use."""
    received: list[int] = []
    child: list[subprocess.Popen[bytes]] = []
    with _stop_signals(received, child):
        descriptor = take_file_lock(run_dir / LOCK, LOCK_PATIENCE_S)
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
    record = Attempt(socket.gethostname(), os.getpid(), now(), pid_started=process_start(os.getpid()))
    attempts = [*read_attempts(run_dir), record]
    _write(run_dir, attempts)
    with os.fdopen(open_own(run_dir / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as log:
        begin = log.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[descriptor],
            env={**os.environ, RESTARTS: "1"},
            start_new_session=True,  # a signal to our group reaches it once, through us
        )
    child.append(process)
    if received:  # before there was anybody to pass it on to
        send_signal(process, signal.SIGUSR2)
    code = process.wait()
    record.exit_code = code if code >= 0 else 128 - code
    record.ended = now()
    lines = _tail(run_dir / LOG, begin)
    # Told to stop, and not able to save, is a failure.
    record.stopped = bool(received) and not _matches(lines, _ERROR)
    if record.exit_code:
        record.error = _last_error(lines) or f"exit code {record.exit_code}"
        if code < 0 and not received:
            record.error = f"killed by {signal.Signals(-code).name}"
    _write(run_dir, attempts)
    return record.exit_code


def _tail(log: Path, begin: int) -> list[str]:
    """What was printed from there on, or the end of it, without empty lines and control characters."""
    with log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - _LOG_TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    printable = ("".join(char if char.isprintable() else " " for char in line).strip() for line in lines)
    return [line for line in printable if line]


def _matches(lines: Sequence[str], pattern: re.Pattern[str]) -> list[str]:
    found = [match[1] for line in lines if (match := pattern.match(line))]
    # torchrun's own exception only says that a rank had one.
    return [line for line in found if "ChildFailedError" not in line]


def _last_error(lines: Sequence[str]) -> str | None:
    """The line that says why: the trainer's own word, else an exception's, else the last."""
    found = _matches(lines, _ERROR) or _matches(lines, _EXCEPTION) or lines
    return found[-1][:500] if found else None


if __name__ == "__main__":
    try:
        sys.exit(attempt(Path(sys.argv[1]), sys.argv[2:]))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
