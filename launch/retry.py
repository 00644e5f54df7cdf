"""`python -m launch.retry SWEEP_DIR`: start those runs of a sweep that are neither done nor running.

A run that was stopped or killed continues from its newest checkpoint. Without a checkpoint, it starts again at step 0
in the same directory.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from launch.cli import command, parse_targets, refuse_no_path, split_arguments
from launch.sweeps.attempt import end_on_gone_host, other_machines, running_on
from launch.sweeps.backends.choose import check_change, make_backend
from launch.sweeps.config import LaunchConfig, world_size
from launch.sweeps.directory import Job, Sweep
from launch.sweeps.expand import change_launch
from launch.sweeps.outcome import conclude, counts
from trainer.config.compose import to_config
from trainer.config.frozen import thaw
from trainer.config.trust import is_within
from trainer.config.validate import validate
from trainer.errors import ConfigError
from trainer.rundir.directory import RunDir
from trainer.shell.printable import print_text

HELP = """\
Start the remaining runs of a sweep: runs that failed, were stopped, never started or lost their process.

usage: python -m launch.retry SWEEP_DIR [launch=NAME] [launch.KEY=VALUE…] [allow_targets=[…]] [gone=HOST]

  SWEEP_DIR      the directory of a sweep
  launch=…       start the runs in another way than the sweep did; launch=print only shows the commands
  allow_targets  trusts packages of your own that the runs use, as on the sweep's own command line
  gone=HOST      the machine HOST no longer exists: runs that are recorded as running there count as failed

Runs that are done are never started again. The command does not disturb runs that are still running; it waits for them.
Exit codes: 0 all done (or submitted), 1 a run failed, 2 bad input, 75 stopped by a signal (continue with the same
command).

examples:
  python -m launch.retry sweeps/2026-01-31_12-00-00_quickstart_3f9a1c
  python -m launch.retry sweeps/decays launch=local launch.slots=1
"""
KEYS = ("allow_targets", "gone")
UNTRUSTED: dict[str, Any] = {"setup": [], "sbatch": {}}
"""Keys of a sweep's recorded `launch` that can run code, each with its empty value."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    return command(arguments, HELP, lambda: _drive(arguments))


def _drive(arguments: Sequence[str]) -> int:
    sweep, launch, allowed, gone = _parse(arguments)
    with sweep.driving():
        if gone is not None:
            _end_runs_on(sweep, gone)
        # Read again under the lock, because another launch command may have written the record in the meantime.
        return _retry(Sweep.open(sweep.path), launch, allowed, arguments)


def _parse(arguments: Sequence[str]) -> tuple[Sweep, LaunchConfig, list[str], str | None]:
    chosen = _of_launch(arguments)
    own, rest = split_arguments(arguments, KEYS)
    folders = [argument for argument in rest if argument not in chosen]
    refuse_no_path(folders, (*KEYS, "launch", *(f"launch.{field.name}" for field in fields(LaunchConfig))))
    if len(folders) != 1:
        raise ConfigError(f"expected one sweep directory, got {' '.join(folders) or 'none'}; see --help")
    sweep = Sweep.open(folders[0])
    launch = sweep.launch_config()
    for key, empty in UNTRUSTED.items():
        if any(argument.lstrip("+").startswith(f"launch.{key}") for argument in chosen):
            # Otherwise recorded entries would be merged into the typed ones.
            launch = replace(launch, **{key: empty})
    launch = change_launch(launch, chosen) if chosen else launch
    allowed = parse_targets(own["allow_targets"]) if "allow_targets" in own else []
    return sweep, launch, allowed, own.get("gone")


def _of_launch(arguments: Sequence[str]) -> list[str]:
    return [argument for argument in arguments if argument.lstrip("+").startswith(("launch=", "launch."))]


def _end_runs_on(sweep: Sweep, host: str) -> None:
    """Record the end of all runs on a machine that no longer exists.

    Raises:
        ConfigError: No run is recorded as running on `host`, or `host` is this machine.
    """
    run_dirs = [sweep.run_dir(job) for job in sweep.jobs]
    elsewhere = other_machines(run_dirs)
    if host not in elsewhere:
        if not elsewhere:
            raise ConfigError(
                f"gone: no run of the sweep is recorded as running on another machine, got {host!r}"
            )
        raise ConfigError(f"gone: expected one of {', '.join(elsewhere)}, got {host!r}")
    for run_dir in run_dirs:
        if running_on(run_dir) == host:
            end_on_gone_host(run_dir)


def _retry(sweep: Sweep, launch: LaunchConfig, allowed: list[str], typed: Sequence[str]) -> int:
    # The backend that started the runs, not the one chosen now, knows which of them are queued or running.
    held = make_backend(sweep.launch_config()).held(sweep)
    sweep.observe(held)
    missing = sweep.missing(held)
    print_text(f"{os.path.relpath(sweep.path)}: {counts(sweep.jobs)}")
    check_change(sweep, launch, held)
    untrusted = [target for target in sweep.targets if not is_within(target, allowed)]
    if missing and untrusted:
        raise ConfigError(
            f"allow_targets: the sweep calls {', '.join(untrusted)}; if you trust this code, run: "
            + sweep.retry_command(sweep.targets, *_of_launch(typed))
        )
    _refuse_untyped(sweep, launch, typed)
    sweep.require_directories(missing)
    backend = make_backend(launch)
    backend.check(_device(sweep, missing, launch))
    if launch.name == "print":
        backend.start(sweep, missing, allowed)
        return 0
    sweep.launch = asdict(launch)
    stopped = backend.start(sweep, missing, allowed)
    return conclude(sweep, backend, stopped=stopped, allowed=allowed)


def _refuse_untyped(sweep: Sweep, launch: LaunchConfig, typed: Sequence[str]) -> None:
    """Refuse to use the recorded folder and settings that can run code, unless the user confirms them.

    A sweep's record may come from an untrusted source. The user confirms by the current folder and by typed arguments.

    Raises:
        ConfigError: A confirmation is missing; the message names it.
    """
    if Path(sweep.cwd) != Path.cwd():
        raise ConfigError(
            f"{sweep.path}: the sweep was started in {sweep.cwd}; if you trust that folder, run this command there"
        )
    for key in UNTRUSTED:
        value = getattr(launch, key)
        was_typed = any(argument.lstrip("+").startswith(f"launch.{key}") for argument in typed)
        is_used = launch.name == "slurm" or (key == "setup" and launch.format == "skypilot")
        if value and is_used and not was_typed:
            raise ConfigError(
                f"launch.{key}: the sweep used {value!r}; if you trust this value, type it again"
            )


def _device(sweep: Sweep, jobs: Sequence[Job], launch: LaunchConfig) -> str:
    """Return `trainer.device` of the jobs, after a check of each configuration for the number of processes."""
    device = "auto"
    for job in jobs:
        config = to_config(thaw(RunDir.open(sweep.run_dir(job)).latest_config()))
        try:
            validate(config, world_size(launch))
        except ConfigError as error:
            raise ConfigError(f"{error} [{job.run_dir}]") from error
        device = config.trainer.device
    return device


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
