"""A sweep's directory: what its runs are, and how they stand as told by what lies on disk.

`sweep.json` is the list of jobs with the state that each was last seen in. It is never the only witness: states are
derived again from the run directories (`launch.sweeps.attempt`), so a driver that is killed takes no knowledge with it.
"""

import datetime
import json
import os
import re
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.sweeps.attempt import LOG, Attempt, now, read_attempts
from launch.sweeps.config import LaunchConfig, check_launch
from launch.sweeps.record import read_record
from trainer.errors import EXIT_STOPPED, ConfigError
from trainer.rundir.directory import META, METRICS, RunDir, git_state
from trainer.rundir.files import read_json, write_atomically
from trainer.rundir.lock import take_file_lock
from trainer.rundir.records import last_step

if TYPE_CHECKING:
    from launch.sweeps.expand import Planned  # brings Hydra, which a look at a sweep need not wait for

SWEEP = "sweep.json"
LOCK = "sweep.lock"
MAX_SWEEP_BYTES = 1 << 24
"""Largest size in bytes of `sweep.json`, enough for 20,000 jobs."""
STATES = ("pending", "running", "done", "failed")
_NAME_LENGTH = 80
_UNSAFE = re.compile(r"[\x00-\x1f\x7f]|\$\{")
"""In a path that goes into commands and configurations: line breaks, and what those would take for a reference."""


class SweepInUse(ConfigError):
    """Another process starts runs of the sweep."""


@dataclass
class Job:
    """A run of a sweep and how it stands."""

    number: int
    run_dir: str
    """Name of its directory under the sweep's."""
    overrides: list[str]
    differs: str
    """The overrides in which it differs from other runs of the sweep."""
    steps: int
    """Steps of the whole run."""
    state: str = "pending"
    """`pending` (also: stopped, to go on), `running`, `done` or `failed`."""
    error: str | None = None
    """Of a failed run, the last line that says why; of a stopped one, that it was."""
    step: int = 0
    """Last step on record."""
    attempts: int = 0
    started: str | None = None
    """Start of its last attempt, UTC."""
    ended: str | None = None
    handle: str | None = None
    """What the backend knows its last attempt by: the slot, or the id in a queue."""


@dataclass
class Sweep:
    """A sweep's directory, opened."""

    path: Path
    experiment: str
    created: str
    cwd: str
    """Folder in which its runs were started: relative paths of data are meant from there."""
    argv: list[str]
    targets: list[str]
    """What its command line allowed to be called. A record: trusted from a command line only."""
    launch: dict[str, Any]
    jobs: list[Job] = field(default_factory=list)

    @classmethod
    def create(cls, path: Path | str | None, runs: "Sequence[Planned]", launch: LaunchConfig) -> "Sweep":
        """Make the directory and prepare every run in it; `sweep.json` is written last.

        Raises:
            ConfigError: it exists or cannot be made. Nothing of it is left behind.
        """
        path = Path(path or default_sweep_dir(runs[0].config.experiment)).absolute()
        if _UNSAFE.search(str(path)):
            raise ConfigError(f"sweep_dir: expected a path without line breaks and ${{, got {str(path)!r}")
        if path.exists():
            raise ConfigError(f"sweep_dir: {path} exists already; expected a directory to make")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except OSError as error:
            raise ConfigError(f"sweep_dir: {path} cannot be made: {error.strerror}") from error
        sweep = cls(
            path=path,
            experiment=runs[0].config.experiment,
            created=now(),
            cwd=os.getcwd(),
            argv=list(sys.argv),
            targets=sorted({target for run in runs for target in run.allowed}),
            launch=asdict(launch),
            jobs=plan_jobs(runs),
        )
        git = git_state()
        try:
            for job, run in zip(sweep.jobs, runs, strict=True):
                RunDir.create(
                    sweep.run_dir(job),
                    config_yaml=run.frozen(path.name),
                    overrides=run.overrides,
                    meta={"experiment": run.config.experiment, "git": git},
                )
            sweep.save()
        except BaseException:
            shutil.rmtree(path)
            raise
        return sweep

    @classmethod
    def open(cls, path: Path | str) -> "Sweep":
        """Find a sweep again.

        Raises:
            ConfigError: it is none, or its record is damaged.
        """
        path = Path(path).absolute()
        try:
            content = read_json(path / SWEEP, MAX_SWEEP_BYTES)
            jobs = [read_record(Job, job) for job in content["jobs"]]
            sweep = read_record(cls, content, path=path, jobs=jobs)
        except FileNotFoundError:
            found = ""
            if (path / META).is_file():
                found = "; this is a run, which python -m trainer resume=RUN_DIR carries on"
            raise ConfigError(f"{path}: expected a sweep's directory (one with a {SWEEP}){found}") from None
        except (OSError, ConfigError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path / SWEEP}: expected the record of a sweep ({error})") from error
        if not jobs:
            raise ConfigError(f"{path / SWEEP}: expected at least one job")
        for job in jobs:  # a record is data: it must not lead anywhere else
            if not re.fullmatch(r"[\w.-]+", job.run_dir) or job.run_dir in (".", ".."):
                raise ConfigError(f"{path / SWEEP}: expected a name under {path}, got {job.run_dir!r}")
            if (path / job.run_dir).is_symlink():
                raise ConfigError(f"{path / job.run_dir}: expected a directory of its own, this is a link")
        return sweep

    def run_dir(self, job: Job) -> Path:
        """The job's run directory."""
        return self.path / job.run_dir

    def save(self) -> None:
        """Write `sweep.json`, atomically."""
        content = {key: value for key, value in asdict(self).items() if key != "path"}
        write_atomically(self.path / SWEEP, json.dumps(content, indent=2) + "\n")

    def observe(self, held: Mapping[int, str]) -> None:
        """Derive every state again from disk.

        Args:
            held: jobs that their backend still has in hand, by number, and the state they are in there.
        """
        for job in self.jobs:
            self.observe_job(job, held.get(job.number))

    def observe_job(self, job: Job, held: str | None = None) -> None:
        """Derive one job's state again; `held` is the state its backend knows it to be in, if it does."""
        run_dir = self.run_dir(job)
        try:
            attempts = read_attempts(run_dir)
        except ConfigError as error:  # of this job alone
            job.state, job.error = held or "failed", str(error)
            return
        last = attempts[-1] if attempts else None
        job.attempts = len(attempts)
        job.started, job.ended = (last.started, last.ended) if last else (None, None)
        job.step = last_step(run_dir / METRICS)
        job.state, job.error = _state(job, last, held, run_dir)

    def missing(self, held: Mapping[int, str]) -> list[Job]:
        """Jobs that are to be run (again): all but what is done or in hand."""
        return [job for job in self.jobs if job.state in ("pending", "failed") and job.number not in held]

    @contextmanager
    def driving(self) -> Iterator[None]:
        """Hold the sweep: one process at a time starts runs of it.

        Raises:
            SweepInUse: another one does.
        """
        descriptor = take_file_lock(self.path / LOCK, 0.5)
        if descriptor is None:
            raise SweepInUse(f"{self.path}: another launch works on this sweep; wait for it, or stop it")
        try:
            yield
        finally:
            os.close(descriptor)

    def launch_config(self) -> LaunchConfig:
        """How its runs were last started.

        Raises:
            ConfigError: the record names no such way.
        """
        try:
            launch = read_record(LaunchConfig, self.launch)
            check_launch(launch)
        except TypeError as error:
            raise ConfigError(f"{self.path / SWEEP}: launch: {error}") from error
        return launch

    def retry_command(self, allowed: Sequence[str] = ()) -> str:
        """What to type to run what is missing."""
        trusted = [f"allow_targets=[{','.join(allowed)}]"] if allowed else []
        return shlex.join(["python", "-m", "launch.retry", os.path.relpath(self.path), *trusted])


def _state(job: Job, last: Attempt | None, held: str | None, run_dir: Path) -> tuple[str, str | None]:
    if held is not None:
        return held, None
    if (last is not None and last.exit_code == 0) or _is_finished(job, run_dir):
        return "done", None
    if last is None:
        return "pending", None
    if last.exit_code is None:
        return "failed", last.error or "its process is gone and left no exit code (killed?)"
    if last.exit_code == EXIT_STOPPED or last.stopped:
        return "pending", f"stopped at step {job.step}"
    return "failed", last.error


def _is_finished(job: Job, run_dir: Path) -> bool:
    """Whether the run came to its report: by hand, perhaps, or in an attempt whose end nobody recorded."""
    return (run_dir / "report" / "index.html").is_file() and job.step >= job.steps


def default_sweep_dir(experiment: str) -> Path:
    """`sweeps/<UTC date-time>_<experiment>_<6 hex>`."""
    moment = datetime.datetime.now(datetime.UTC)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", experiment)
    return Path("sweeps") / f"{moment:%Y-%m-%d_%H-%M-%S}_{name}_{secrets.token_hex(3)}"


def plan_jobs(runs: "Sequence[Planned]") -> list[Job]:
    """Jobs in order, each named after the overrides that not all of them share."""
    shared = set.intersection(*(set(run.overrides) for run in runs))
    width = len(str(len(runs) - 1))
    jobs = []
    for number, run in enumerate(runs):
        differs = [override for override in run.overrides if override not in shared]
        jobs.append(
            Job(
                number=number,
                run_dir="_".join([f"{number:0{width}}", *_short(differs)])[:_NAME_LENGTH].rstrip("._-"),
                overrides=run.overrides,
                differs=" ".join(differs),
                steps=run.config.trainer.steps,
            )
        )
    return jobs


def _short(overrides: Sequence[str]) -> list[str]:
    """Overrides as parts of a file name: `ema.decay=0.9` as `decay_0.9`; all of the key where that is unclear."""
    split = [override.lstrip("+~").partition("=") for override in overrides]
    leaves = [key.rpartition(".")[2] for key, _, _ in split]
    return [
        re.sub(r"[^A-Za-z0-9.-]+", "_", f"{leaf if leaves.count(leaf) == 1 else key}_{value}").strip("_")
        for (key, _, value), leaf in zip(split, leaves, strict=True)
    ]


def output_log(sweep: Sweep, job: Job) -> Path:
    """Where all that the job printed is."""
    return sweep.run_dir(job) / LOG
