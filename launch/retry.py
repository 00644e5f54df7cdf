"""`python -m launch.retry SWEEP_DIR`: run what is missing of a sweep, and only that.

Runs that were stopped or killed go on from their newest checkpoint; those without one begin again in their directory.
"""

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from launch.cli import command, parse_targets, split_arguments
from launch.sweeps.attempt import end_on_gone_host, running_on
from launch.sweeps.backends.choose import make_backend
from launch.sweeps.config import LaunchConfig, world_size
from launch.sweeps.directory import Job, Sweep
from launch.sweeps.expand import change_launch
from launch.sweeps.outcome import conclude, counts
from trainer.config.compose import thaw, to_config
from trainer.config.validate import validate
from trainer.errors import ConfigError
from trainer.rundir.directory import RunDir

HELP = """\
Run what is missing of a sweep: runs that failed, were stopped, were never started or whose process is gone.

usage: python -m launch.retry SWEEP_DIR [launch=NAME] [launch.KEY=VALUE…] [allow_targets=[…]] [gone=HOST]

  SWEEP_DIR      the directory of a sweep
  launch=…       start them in another way than the sweep was; launch=print only shows the commands
  allow_targets  what the runs may call of your own code, as the sweep's own command line said it
  gone=HOST      that machine is gone, and with it what it was running for this sweep

What is done is never run again, what still runs is left alone and waited for.
Exit codes: 0 all done (or handed over), 1 a run failed, 2 bad input, 75 stopped by a signal (the same command goes on).

examples:
  python -m launch.retry sweeps/2026-01-31_12-00-00_quickstart_3f9a1c
  python -m launch.retry sweeps/decays launch=local launch.slots=1
"""
UNTRUSTED: dict[str, Any] = {"setup": [], "sbatch": {}}
"""What of a sweep's record would run code, and its value in none."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return command(arguments, HELP, lambda: _drive(arguments))


def _drive(arguments: Sequence[str]) -> int:
    sweep, launch, allowed, gone = _parse(arguments)
    with sweep.driving():
        if gone is not None:
            _give_up(sweep, gone)
        # Read again under the lock: another driver may have written since.
        return _retry(Sweep.open(sweep.path), launch, allowed, arguments)


def _parse(arguments: Sequence[str]) -> tuple[Sweep, LaunchConfig, list[str], str | None]:
    chosen = [argument for argument in arguments if argument.lstrip("+").startswith(("launch=", "launch."))]
    own, rest = split_arguments(arguments, ["allow_targets", "gone"])
    folders = [argument for argument in rest if argument not in chosen]
    if len(folders) != 1:
        raise ConfigError(f"expected one sweep directory, got {' '.join(folders) or 'none'}; see --help")
    sweep = Sweep.open(folders[0])
    launch = sweep.launch_config()
    for key, empty in UNTRUSTED.items():
        if any(argument.lstrip("+").startswith(f"launch.{key}") for argument in chosen):
            launch = replace(launch, **{key: empty})  # what was typed is not to bring along what was not
    launch = change_launch(launch, chosen) if chosen else launch
    allowed = parse_targets(own["allow_targets"]) if "allow_targets" in own else []
    return sweep, launch, allowed, own.get("gone")


def _give_up(sweep: Sweep, host: str) -> None:
    """Record the end of what ran on a machine that is gone.

    Raises:
        ConfigError: nothing runs there, or it is this machine, which knows better.
    """
    hosts = {job.number: running_on(sweep.run_dir(job)) for job in sweep.jobs}
    elsewhere = sorted({*filter(None, hosts.values())} - {socket.gethostname()})
    if host not in elsewhere:
        raise ConfigError(
            f"gone: expected one of {', '.join(elsewhere) or '(no other machine runs any of it)'}, got {host!r}"
        )
    for job in sweep.jobs:
        if hosts[job.number] == host:
            end_on_gone_host(sweep.run_dir(job))


def _retry(sweep: Sweep, launch: LaunchConfig, allowed: list[str], typed: Sequence[str]) -> int:
    # What is in hand is asked of the backend that started it, not of the one that goes on.
    held = make_backend(sweep.launch_config()).held(sweep)
    sweep.observe(held)
    missing = sweep.missing(held)
    print(f"{os.path.relpath(sweep.path)}: {counts(sweep.jobs)}", flush=True)
    if held and launch.name not in (sweep.launch_config().name, "print"):
        raise ConfigError(
            f"launch: {len(held)} runs are still in hand of {sweep.launch_config().name}; wait for them"
        )
    untrusted = [target for target in sweep.targets if not _within(target, allowed)]
    if missing and untrusted:
        raise ConfigError(
            f"allow_targets: the sweep calls {', '.join(untrusted)}; if you trust that: "
            + sweep.retry_command(sweep.targets)
        )
    _refuse_untyped(sweep, launch, typed)
    backend = make_backend(launch)
    backend.check(_device(sweep, missing, launch))
    if launch.name == "print":
        backend.start(sweep, missing, allowed)
        return 0
    sweep.launch = asdict(launch)
    stopped = backend.start(sweep, missing, allowed)
    return conclude(sweep, backend, stopped=stopped, allowed=allowed)


def _refuse_untyped(sweep: Sweep, launch: LaunchConfig, typed: Sequence[str]) -> None:
    """The record of a sweep may be a stranger's: what runs code is taken from the command line and the shell only.

    Raises:
        ConfigError: saying what to type.
    """
    if Path(sweep.cwd) != Path.cwd():
        raise ConfigError(
            f"{sweep.path}: the sweep was started in {sweep.cwd}; if you trust it, cd there first"
        )
    for key in UNTRUSTED:
        value = getattr(launch, key)
        was_typed = any(argument.lstrip("+").startswith(f"launch.{key}") for argument in typed)
        if value and launch.name == "slurm" and not was_typed:
            raise ConfigError(f"launch.{key}: the sweep used {value!r}; if you trust that, type it again")


def _within(target: str, allowed: Sequence[str]) -> bool:
    return any(f"{target}.".startswith(f"{prefix.rstrip('.')}.") for prefix in allowed)


def _device(sweep: Sweep, jobs: Sequence[Job], launch: LaunchConfig) -> str:
    """`trainer.device` of the jobs, each checked against the number of processes it is going to have."""
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
