"""Short runs in processes of their own: nothing that one leaves in its memory can help the next."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from launch.sweeps.attempt import last_error, tail
from launch.sweeps.backends.base import import_variables, launcher, resuming
from launch.sweeps.config import LaunchConfig
from launch.sweeps.signals import end_at_once
from trainer.distributed.torchrun import outside_torchrun
from trainer.rundir.directory import RunDir


@dataclass
class RunFailed(Exception):
    """A short run did not reach its last step."""

    code: int
    """Its exit code; 2 means that the trainer refuses its settings."""
    reason: str
    """The line of its output with the cause."""

    def __str__(self) -> str:
        return f"the short run ended with exit code {self.code}: {self.reason}"


def train(run_dir: RunDir, processes: int, allowed: Sequence[str]) -> None:
    """Start or continue a short run in new processes, and wait until it has ended.

    Args:
        run_dir: directory of the run.
        processes: number of processes, which torchrun starts if it is above 1.
        allowed: prefixes of `_target_` that the user trusts.

    Raises:
        RunFailed: The run did not reach its last step.
    """
    words = [*launcher(LaunchConfig(processes_per_node=processes)), "-m", "trainer"]
    log = run_dir.path / "output.log"
    with log.open("ab") as output:
        begin = output.tell()
        process = subprocess.Popen(
            [*words, *resuming(str(run_dir.path), allowed)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,  # so that Ctrl-C ends it through us
        )
        try:
            code = process.wait()
        finally:
            end_at_once(process)
    if code:
        raise RunFailed(code, last_error(tail(log, begin)) or "no output")


def _environment() -> dict[str, str]:
    variables = {**outside_torchrun(), **import_variables()}
    if {"", os.getcwd()} & set(sys.path):  # the user's own modules are found where this process finds them
        paths = [variables.get("PYTHONPATH", ""), os.getcwd()]
        variables["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return variables
