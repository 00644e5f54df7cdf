"""`python -m launch.status DIR…`: status of runs and sweeps, read from their files.

The command works at any time and from any shell, even after the launch command or the run was killed.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.cli import command, refuse_no_path
from launch.run_status import run_lines
from launch.sweeps.attempt import other_machines
from launch.sweeps.backends.choose import make_backend
from launch.sweeps.directory import SWEEP, Sweep, SweepInUse
from launch.sweeps.outcome import counts, job_lines
from trainer.errors import EXIT_DONE, ConfigError
from trainer.rundir.directory import META
from trainer.shell.commands import command_lines
from trainer.shell.printable import print_text

HELP = """\
Show the state of each run of a sweep (pending, running, stopped, done, or failed with the error), or the status of one
run: its state, loss, throughput, time left, and the best average compared with the live weights.

usage: python -m launch.status DIR…

  DIR  the directory of a run, of a sweep, or a folder of runs and sweeps such as outputs/ (the record of a sweep,
       sweep.json, is also updated, unless another launch command is using it)

Exit codes: 0 done, 2 bad input.

examples:
  python -m launch.status sweeps/2026-01-31_12-00-00_quickstart_3f9a1c
  watch python -m launch.status outputs/mine
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    return command(arguments, HELP, lambda: _status(arguments))


def _status(arguments: Sequence[str]) -> int:
    refuse_no_path(arguments, ())
    for path in map(Path, arguments):
        if not path.is_dir():
            raise ConfigError(
                f"{path}: no such directory; expected a sweep or a run (whose directory is made after its model)"
            )
        for found in _runs_and_sweeps(path) or [path]:
            if (found / SWEEP).exists():
                _show(Sweep.open(found))
            else:
                print_text(*run_lines(found))
    return EXIT_DONE


def _runs_and_sweeps(path: Path, depth: int = 2) -> list[Path]:
    """Return a run or a sweep as it is; of another folder the runs and sweeps in it and in its folders, by name."""
    if (path / SWEEP).exists() or (path / META).is_file():
        return [path]
    if depth == 0:
        return []
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.is_symlink())
    return [found for folder in folders for found in _runs_and_sweeps(folder, depth - 1)]


def _show(sweep: Sweep) -> None:
    held = make_backend(sweep.launch_config()).held(sweep)
    sweep.observe(held)
    in_use, missing = not _save_states(sweep, held), sweep.missing(held)
    print_text(f"{os.path.relpath(sweep.path)}: {counts(sweep.jobs)}", *job_lines(sweep))
    if sweep.launch_config().name == "local":
        for host in other_machines(map(sweep.run_dir, sweep.jobs)):
            retry = sweep.retry_command(sweep.targets, f"gone={host}")
            print(f"The record shows runs on {host!r}. If that machine no longer exists:", retry, sep="\n  ")
    if in_use:
        remaining = " and starts its remaining runs" if missing else ""
        print(f"Another launch command is using this sweep{remaining}.")
    elif missing:
        try:
            sweep.require_directories(missing)
        except ConfigError as error:
            print_text(f"The remaining runs cannot be started: {error}")
        else:
            retry = sweep.retry_command(sweep.targets)
            print(*command_lines("Start the remaining runs with:", [retry]), sep="\n")


def _save_states(sweep: Sweep, held: Mapping[int, str]) -> bool:
    """Write the current states into `sweep.json`; return False if another launch command is using the sweep.

    A sweep that cannot be written is shown all the same.
    """
    if not os.access(sweep.path, os.W_OK):
        return True
    try:
        with sweep.driving():
            # Read again under the lock, because another launch command may have written the record in the meantime.
            current = Sweep.open(sweep.path)
            current.observe(held)
            current.save_if_possible()
    except SweepInUse:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
