"""Status of one run, read from its directory: the process that trains it and the newest records. No torch."""

import math
import os
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch.sweeps.attempt import LOCK
from trainer.config.own_code import TRAINED
from trainer.config.trust_note import trust_note
from trainer.errors import ConfigError
from trainer.report.runs import Run
from trainer.report.status import RunStatus
from trainer.rundir.checkpoints import saved_step
from trainer.rundir.continuing import has_only_records
from trainer.rundir.directory import META, RunDir
from trainer.rundir.files import parse_yaml
from trainer.rundir.keys import EVALUATION
from trainer.rundir.lock import held_by, is_file_locked, torchrun_of
from trainer.rundir.records import Record, newest_records
from trainer.shell.commands import command_lines, hydra_quoted, train_command

DEAD = "not running (no process holds it)"
NOT_STARTED = "not started"
STOPPED = "stopped"
CONTINUABLE = (DEAD, NOT_STARTED, STOPPED)
"""States in which the user can start or continue the run."""


def run_lines(path: Path | str) -> list[str]:
    """Return lines with the state and the newest records of a run.

    If the run stopped early, the last line is the command that continues it, or advises a new run without a checkpoint.

    Raises:
        ConfigError: `path` is no run directory, or a file in it is damaged.
    """
    run_dir = RunDir.open(path, key="status")
    run = Run(run_dir.path, run_dir.path.name, {}, run_dir.meta)
    metric = run.primary_metric
    higher = run.higher_is_better(metric)
    config = _config(run_dir)
    status = RunStatus(total=_total_steps(config, run_dir), metric=metric, higher_is_better=higher)
    evaluated_at = _take_newest(status, run_dir.metrics_path)
    holder = held_by(run_dir.path)
    shown = os.path.relpath(run_dir.path)
    saved = saved_step(run_dir.path)
    state = _state(run_dir, status, holder, saved)
    first = [state, f"step {status.step}/{status.total}"]
    if saved is not None and state in CONTINUABLE:
        first.append(f"saved at step {saved}")
    if holder is not None and math.isfinite(status.latest.get("time/step_s", math.nan)):
        first.append(f"{status.time_left(status.latest['time/step_s'])} left")
    if run_dir.metrics_path.exists():
        age_s = max(0, int(time.time() - run_dir.metrics_path.stat().st_mtime))
        first.append(f"last record {timedelta(seconds=age_s)} ago")
    lines = [f"{shown}: {', '.join(first)}"]
    if status.latest:
        lines.append("  " + "  ".join(status.training()))
    if status.evaluation:
        parts = status.evaluated() + status.divergence()
        lines.append("  " + "  ".join(parts) + f"  (evaluated at step {evaluated_at})")
    if state in CONTINUABLE and status.step < status.total:
        if has_only_records(run_dir):
            return [*lines, "It has no checkpoint to continue from; start a new run."]
        command = train_command([f"resume={hydra_quoted(shown)}"], *_processes(run_dir))
        lines += command_lines(f"Continue it with{trust_note(config, TRAINED)}:", [command])
    return lines


def _processes(run_dir: RunDir) -> tuple[int, int]:
    """Return the numbers of processes and of nodes of the first session."""
    world, nodes = (run_dir.meta.get(name, 1) for name in ("world_size", "nodes"))
    if not (isinstance(world, int) and isinstance(nodes, int) and 1 <= nodes <= world):
        raise ConfigError(f"{run_dir.path / META}: expected world_size and nodes, got {world!r}, {nodes!r}")
    return world, nodes


def _state(run_dir: RunDir, status: RunStatus, holder: str | None, saved: int | None) -> str:
    if holder is not None:
        return f"running ({holder})"
    if status.step >= status.total and (run_dir.report / "index.html").is_file():
        return "done"
    if (torchrun := torchrun_of(run_dir.path)) is not None:
        return f"no rank is running; its torchrun ({torchrun}) is starting, restarting or ending the ranks"
    if is_file_locked(run_dir.path / LOCK):
        return "no rank is running; its attempt is starting, restarting or ending the ranks"
    if saved is not None and saved >= status.step:  # it saved where it ended; a run that was killed did not
        return STOPPED
    return DEAD if run_dir.metrics_path.exists() else NOT_STARTED


def _config(run_dir: RunDir) -> dict[str, Any]:
    """Return the configuration of the last session, parsed as plain YAML without composing it."""
    try:
        config = parse_yaml(run_dir.latest_config())
    except ValueError as error:
        raise ConfigError(f"{run_dir.config_path}: expected YAML ({error})") from error
    return config if isinstance(config, dict) else {}


def _total_steps(config: Mapping[str, Any], run_dir: RunDir) -> int:
    try:
        return int(config["trainer"]["steps"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{run_dir.config_path}: expected trainer.steps ({error!r})") from error


def _take_newest(status: RunStatus, path: Path) -> int | None:
    """Update `status` with the newest records, from the last evaluation on; return the step of this evaluation."""
    records = newest_records(path, lambda records: any(map(_has_evaluation, records)))
    for step, record in records:
        status.update(step, record)
    return next((record[0] for record in reversed(records) if _has_evaluation(record)), None)


def _has_evaluation(record: Record) -> bool:
    return any(key.startswith(EVALUATION) for key in record[1])
