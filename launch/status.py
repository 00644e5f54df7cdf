"""`python -m launch.status DIR…`: how a sweep or a single run stands, as told by what lies on disk.

It may be asked at any time and from any shell, also when the sweep's driver or the run was killed.
"""

import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.cli import command
from launch.run_status import run_lines
from launch.sweeps.attempt import running_on
from launch.sweeps.backends.choose import make_backend
from launch.sweeps.directory import SWEEP, Sweep, SweepInUse
from launch.sweeps.outcome import counts, job_lines
from trainer.errors import EXIT_DONE, ConfigError
from trainer.rundir.directory import META

HELP = """\
Say how the runs of a sweep stand (pending, running, done, or failed with the line that says why), or how one run
does: whether it goes on, loss, throughput, time left, and the best average against the live weights.

usage: python -m launch.status DIR…

  DIR  the directory of a sweep (its sweep.json is brought up to date for scripts, if no launch works on it) or of a run

Exit codes: 0 done, 2 bad input.

examples:
  python -m launch.status sweeps/2026-01-31_12-00-00_quickstart_3f9a1c
  watch python -m launch.status outputs/mine
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return command(arguments, HELP, lambda: _status(arguments))


def _status(arguments: Sequence[str]) -> int:
    for path in map(Path, arguments):
        if not path.is_dir():
            raise ConfigError(
                f"{path}: no such directory; expected a sweep or a run (made once its model is built)"
            )
        if (path / META).is_file() and not (path / SWEEP).exists():
            print(*run_lines(path), sep="\n")
        else:
            _show(Sweep.open(path))
    return EXIT_DONE


def _show(sweep: Sweep) -> None:
    held = make_backend(sweep.launch_config()).held(sweep)
    sweep.observe(held)
    has_driver = not _bring_up_to_date(sweep, held)
    print(f"{os.path.relpath(sweep.path)}: {counts(sweep.jobs)}", *job_lines(sweep), sep="\n")
    if sweep.launch_config().name == "local":
        for host in sorted(
            {*filter(None, map(running_on, map(sweep.run_dir, sweep.jobs)))} - {socket.gethostname()}
        ):
            retry = f"{sweep.retry_command(sweep.targets)} {shlex.quote(f'gone={host}')}"
            print(f"On {host!r}, as far as is known from here; if that machine is gone:", retry, sep="\n  ")
    if has_driver:
        print("A launch works on it, and starts what is missing.")
    elif sweep.missing(held):
        print("Run what is missing:", sweep.retry_command(sweep.targets), sep="\n  ")


def _bring_up_to_date(sweep: Sweep, held: Mapping[int, str]) -> bool:
    """Write the states down; False if a driver does that."""
    if not os.access(sweep.path, os.W_OK):
        return True
    try:
        with sweep.driving():
            # Read again under the lock: a driver may have noted more since.
            current = Sweep.open(sweep.path)
            current.observe(held)
            current.save()
    except SweepInUse:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
