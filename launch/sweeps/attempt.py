"""`python -m launch.sweeps.attempt RUN_DIR COMMAND…`: run a command as a recorded attempt of a run.

This process waits for the command and records the result, even if the process that started both is killed. It adds an
entry to `attempts.json` when the command starts, adds the exit code when the command ends, and appends all output to
`output.log`. The command inherits the lock on `attempt.lock`, so the kernel releases the lock only when both processes
have ended. A held lock therefore means that the run is still running, and prevents a second attempt in its directory.
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
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.sweeps.record import read_record
from launch.sweeps.signals import handling, send_signal
from trainer.distributed.torchrun import RESTARTS, complain, process_start
from trainer.errors import EXIT_BAD_INPUT, EXIT_FAILED, ConfigError
from trainer.rundir.files import open_own, read_json, write_atomically
from trainer.rundir.lock import held_by, is_file_locked, take_file_lock
from trainer.shell.terminal import PATIENT_SIGNALS, STOP_SIGNALS

ATTEMPTS = "attempts.json"
LOCK = "attempt.lock"
LOG = "output.log"

INHERITED = "POLYAK_INHERITED_LOCKS"
"""Environment variable with the descriptors of further locks, separated by commas, that the command holds too."""
EXIT_TAKEN = 73
"""Exit code of this command if another attempt is using the directory."""
LOCK_PATIENCE_S = 2.0
"""Longest wait for the lock, in seconds."""
REPEAT_AFTER_S = 1.0
"""A further SIGTERM or SIGINT later than this, in seconds, means that the user does not want to wait for the save."""

_ERROR = re.compile(r"error: (.+)")
_EXCEPTION = re.compile(
    r"(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt|NonFiniteStep|Warning)\b(?!Error).*)"
)
_LOG_TAIL_BYTES = 1 << 18


@dataclass
class Attempt:
    """One start of a run's command, as recorded in `attempts.json`."""

    host: str
    pid: int
    """Process id of the keeper: the process that writes this record and passes signals on to the command."""
    started: str
    """Time of the start, UTC."""
    ended: str | None = None
    """Time of the end, UTC; None while the command runs, or if the keeper was killed."""
    exit_code: int | None = None
    """Exit code as in a shell, 128 + n after signal n; None while the command runs, or if the keeper was killed."""
    stopped: bool = False
    """Whether the keeper received a signal to stop and the command did not fail to save."""
    error: str | None = None
    """Line of the output with the cause of a failure."""
    pid_started: int | None = None
    """Start time of the keeper in the kernel's clock ticks, because the kernel reuses process ids."""


def now() -> str:
    """Return the current time for a record, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read_attempts(run_dir: Path) -> list[Attempt]:
    """Return all recorded attempts of a run, oldest first.

    Raises:
        ConfigError: The record is damaged.
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
    """Return the name of the machine on which a run is running, or None if it is not running.

    On this machine, a run is running if a process holds the attempt's lock or the run's own lock. On other machines, it
    counts as running if the record of the last attempt has no end.
    """
    if is_file_locked(run_dir / LOCK) or held_by(run_dir):
        return socket.gethostname()
    try:
        attempts = read_attempts(run_dir)
    except ConfigError:  # `Sweep.observe` reports the damaged record
        return None
    is_elsewhere = attempts and attempts[-1].ended is None and attempts[-1].host != socket.gethostname()
    return attempts[-1].host if is_elsewhere else None


def other_machines(run_dirs: Iterable[Path]) -> list[str]:
    """Return the names of the other machines on which runs are recorded as running, sorted."""
    return sorted({*filter(None, map(running_on, run_dirs))} - {socket.gethostname()})


def end_on_gone_host(run_dir: Path) -> None:
    """Record the end of the last attempt, because its machine no longer exists."""
    attempts = read_attempts(run_dir)
    attempts[-1].ended, attempts[-1].error = now(), f"its machine {attempts[-1].host} is gone"
    _write(run_dir, attempts)


def keeper(run_dir: Path) -> int | None:
    """Return the process id of the running attempt's keeper, or None if no keeper is running on this machine."""
    attempts = read_attempts(run_dir)
    if not attempts or attempts[-1].host != socket.gethostname() or attempts[-1].ended is not None:
        return None
    last = attempts[-1]
    return last.pid if process_start(last.pid) == last.pid_started is not None else None


def _write(run_dir: Path, attempts: Sequence[Attempt]) -> None:
    records = [asdict(attempt) for attempt in attempts]
    write_atomically(run_dir / ATTEMPTS, json.dumps(records, indent=2) + "\n", make_folder=False)


def _forward(number: int, received: list[float], child: Sequence[subprocess.Popen[bytes]]) -> None:
    """Note the time of a signal to stop, and pass it on to the command if that was started."""
    received.append(time.monotonic())
    waited_s = received[-1] - received[0]
    again = len(received) > 1 and number not in PATIENT_SIGNALS and waited_s >= REPEAT_AFTER_S
    for process in child:
        send_signal(process, signal.SIGTERM if again else signal.SIGUSR2)


def attempt(run_dir: Path, command: Sequence[str]) -> int:
    """Run the command to its end and record it; return its exit code.

    Returns `EXIT_TAKEN`, without running the command, if another attempt is using the directory.

    Raises:
        ConfigError: `attempts.json` is damaged, or a file of the run directory is a link.
    """
    received: list[float] = []
    child: list[subprocess.Popen[bytes]] = []
    with handling(STOP_SIGNALS, lambda number, frame: _forward(number, received, child)):
        descriptor = take_file_lock(run_dir / LOCK, LOCK_PATIENCE_S)
        if descriptor is None:
            return EXIT_TAKEN
        try:
            return _run_recorded(run_dir, command, descriptor, received, child)
        finally:
            os.close(descriptor)


def _run_recorded(
    run_dir: Path,
    command: Sequence[str],
    descriptor: int,
    received: Sequence[float],
    child: list[subprocess.Popen[bytes]],
) -> int:
    record = Attempt(socket.gethostname(), os.getpid(), now(), pid_started=process_start(os.getpid()))
    attempts = [*read_attempts(run_dir), record]
    _write(run_dir, attempts)
    with os.fdopen(open_own(run_dir / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as log:
        begin = log.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[descriptor, *map(int, filter(None, os.environ.get(INHERITED, "").split(",")))],
            env={**{key: value for key, value in os.environ.items() if key != INHERITED}, RESTARTS: "1"},
            start_new_session=True,  # signals to our process group reach the command only through us, once
        )
    # Blocked, so that a signal at this moment is passed on once, by the handler.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    child.append(process)
    early = bool(received)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if early:  # a signal arrived before the command was started
        send_signal(process, signal.SIGUSR2)
    code = process.wait()
    record.exit_code = code if code >= 0 else 128 - code
    record.ended = now()
    lines = tail(run_dir / LOG, begin)
    # A run that should stop but could not save has failed.
    record.stopped = bool(received) and not _matches(lines, _ERROR)
    if record.exit_code:
        record.error = last_error(lines) or f"exit code {record.exit_code}"
        if code < 0 and not received:
            record.error = f"killed by {signal.Signals(-code).name}"
    _write(run_dir, attempts)
    return record.exit_code


def tail(log: Path, begin: int) -> list[str]:
    """Return the lines printed since `begin`, at most the last 256 KiB, without empty lines and control characters."""
    with log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - _LOG_TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    printable = ("".join(char if char.isprintable() else " " for char in line).strip() for line in lines)
    return [line for line in printable if line]


def _matches(lines: Sequence[str], pattern: re.Pattern[str]) -> list[str]:
    found = [match[1] for line in lines if (match := pattern.match(line))]
    # torchrun's own exception does not contain the cause, only that a rank failed.
    return [line for line in found if "ChildFailedError" not in line]


def last_error(lines: Sequence[str]) -> str | None:
    """Return the line with the cause: the trainer's last `error:` line, else the last exception, else the last line."""
    candidates = _matches(lines, _ERROR) or _matches(lines, _EXCEPTION) or lines
    return candidates[-1][:500] if candidates else None


if __name__ == "__main__":
    try:
        sys.exit(attempt(Path(sys.argv[1]), sys.argv[2:]))
    except (ConfigError, OSError) as error:  # such as a full disk
        complain(error)
        sys.exit(EXIT_BAD_INPUT if isinstance(error, ConfigError) else EXIT_FAILED)
