"""Sweeps without runs, for tests of what is read from their records."""

import json
import socket
from typing import Any

from launch.sweeps.attempt import ATTEMPTS
from launch.sweeps.directory import Sweep
from launch.sweeps.expand import expand


def make_sweep(*arguments: str) -> Sweep:
    """`sweep` in the current folder: three seeds of ten steps, none of them started."""
    plan = expand(["-m", "seed=0,1,2", "trainer.steps=10", "launch.slots=1", *arguments])
    return Sweep.create("sweep", plan.runs, plan.launch)


def put(sweep: Sweep, number: int, **fields: Any) -> None:
    """One attempt on record for a job."""
    record = {"host": socket.gethostname(), "pid": 1, "started": "2026-01-01T00:00:00+00:00", **fields}
    (sweep.run_dir(sweep.jobs[number]) / ATTEMPTS).write_text(json.dumps([record]))
