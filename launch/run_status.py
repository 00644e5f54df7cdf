"""The status of one run, from its directory: the process that holds it and its newest records. No torch."""

import math
import os
import shlex
import time
from datetime import timedelta
from pathlib import Path

from launch.sweeps.attempt import LOCK
from trainer.distributed.torchrun import launcher
from trainer.errors import ConfigError
from trainer.report.status import RunStatus
from trainer.rundir.directory import META, RunDir
from trainer.rundir.files import parse_yaml
from trainer.rundir.keys import EVALUATION
from trainer.rundir.lock import held_by, is_file_locked, torchrun_of
from trainer.rundir.records import Record, newest_records

STOPPED = ("not running (no process holds it)", "not started")
"""What may be carried on, or begun, by hand."""


def run_lines(path: Path | str) -> list[str]:
    """Lines for people: state, steps, time left, then loss, throughput, and the best average of the last evaluation.

    Raises:
        ConfigError: no run directory, or one that is damaged.
    """
    run_dir = RunDir.open(path, key="status")
    status = RunStatus(
        total=_total_steps(run_dir),
        metric=str(run_dir.meta.get("primary_metric", "loss")),
        higher_is_better=run_dir.meta.get("primary_metric") in (run_dir.meta.get("higher_is_better") or []),
    )
    evaluated_at = _take_newest(status, run_dir.metrics_path)
    holder = held_by(run_dir.path)
    shown = os.path.relpath(run_dir.path)
    state = _state(run_dir, status, holder)
    first = [state, f"step {status.step}/{status.total}"]
    if holder is not None and math.isfinite(status.latest.get("time/step_s", math.nan)):
        first.append(f"{status.time_left(status.latest['time/step_s'])} left")
    if (age := _age(run_dir.metrics_path)) is not None:
        first.append(f"last record {age} ago")
    lines = [f"{shown}: {', '.join(first)}"]
    if status.latest:
        lines.append("  " + "  ".join(status.training()))
    if status.evaluation:
        parts = status.evaluated() + status.divergence()
        lines.append("  " + "  ".join(parts) + f"  (evaluated at step {evaluated_at})")
    if state in STOPPED and status.step < status.total:
        start, comment = launcher(*_processes(run_dir))
        lines += ["Carry it on:", f"  {start} -m trainer {shlex.quote(f'resume={shown}')}{comment}"]
    return lines


def _processes(run_dir: RunDir) -> tuple[int, int]:
    """Of the first session, and on how many nodes."""
    world, nodes = (run_dir.meta.get(name, 1) for name in ("world_size", "nodes"))
    if not (isinstance(world, int) and isinstance(nodes, int) and 1 <= nodes <= world):
        raise ConfigError(f"{run_dir.path / META}: expected world_size and nodes, got {world!r}, {nodes!r}")
    return world, nodes


def _state(run_dir: RunDir, status: RunStatus, holder: str | None) -> str:
    if holder is not None:
        return f"running ({holder})"
    if status.step >= status.total and (run_dir.report / "index.html").is_file():
        return "done"
    if (torchrun := torchrun_of(run_dir.path)) is not None:
        return f"no rank at work; its torchrun ({torchrun}) lives, and is starting, restarting or ending them"
    if is_file_locked(run_dir.path / LOCK):
        return "no rank at work; its attempt is starting, restarting or ending them"
    return STOPPED[not run_dir.metrics_path.exists()]


def _total_steps(run_dir: RunDir) -> int:
    """Of the last session; a configuration is data here and is not composed."""
    try:
        return int(parse_yaml(run_dir.latest_config())["trainer"]["steps"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{run_dir.config_path}: expected trainer.steps ({error!r})") from error


def _take_newest(status: RunStatus, path: Path) -> int | None:
    """Take the newest records, back to the last evaluation; return its step."""
    records = newest_records(path, lambda found: any(map(_has_evaluation, found)))
    for step, record in records:
        status.update(step, record)
    return next((record[0] for record in reversed(records) if _has_evaluation(record)), None)


def _has_evaluation(record: Record) -> bool:
    return any(key.startswith(EVALUATION) for key in record[1])


def _age(path: Path) -> str | None:
    if not path.exists():
        return None
    return str(timedelta(seconds=max(0, int(time.time() - path.stat().st_mtime))))
