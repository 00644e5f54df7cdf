"""Directory of a sweep: the list of its runs and their states.

`sweep.json` lists the jobs with the last state that was written for each. Current states are always derived again from
the run directories (see `launch.sweeps.attempt`), so no state is lost if the launch command is killed.
"""

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.sweeps.attempt import LOG, Attempt, now, read_attempts
from launch.sweeps.config import LaunchConfig, check_launch
from launch.sweeps.record import read_record
from trainer.config.on_checkpoint import is_trust
from trainer.errors import EXIT_STOPPED, ConfigError
from trainer.rundir.checkpoints import saved_step
from trainer.rundir.circumstances import git_state
from trainer.rundir.directory import CONFIG, META, METRICS, default_run_dir
from trainer.rundir.files import check_free, made_aside, read_json, write_atomically
from trainer.rundir.lock import take_file_lock
from trainer.rundir.records import last_step
from trainer.shell.commands import command, path_argument, trust
from trainer.shell.printable import print_text

if TYPE_CHECKING:
    from launch.sweeps.expand import Planned  # imports Hydra, which `launch.status` does not need

SWEEP = "sweep.json"
LOCK = "sweep.lock"
MAX_SWEEP_BYTES = 1 << 24
"""Largest size in bytes of `sweep.json`, enough for 20,000 jobs."""
STATES = ("pending", "running", "stopped", "done", "failed")
"""States as they are printed, in this order."""
_NAME_LENGTH = 80
"""Longest name of a run directory, in characters."""
_UNSAFE = re.compile(r"[\x00-\x1f\x7f]|\$\{")
"""Text that a sweep's path must not contain: control characters and references of a configuration."""


class SweepInUse(ConfigError):
    """Another launch command is using the sweep."""


@dataclass
class Job:
    """One run of a sweep, with its state."""

    number: int
    """Position in the sweep, from 0."""
    run_dir: str
    """Name of the run directory in the sweep's directory."""
    overrides: list[str]
    """Changes to the default configuration."""
    differs: str
    """Overrides that are not shared by all runs of the sweep, separated by spaces."""
    steps: int
    """Total steps of the run."""
    state: str = "pending"
    """`pending` (not started, queued, or stopped after saving), `running`, `done` or `failed`."""
    error: str | None = None
    """Line of the output with the cause if the run failed; a note with the step if it was stopped."""
    step: int = 0
    """Last recorded step."""
    attempts: int = 0
    """Number of attempts."""
    started: str | None = None
    """Start of the last attempt, UTC."""
    ended: str | None = None
    """End of the last attempt, UTC."""
    handle: str | None = None
    """Backend's name for the last attempt: the number of the slot, or the id in the queue."""

    @property
    def shown_state(self) -> str:
        """The state as it is printed: a job that was stopped and waits for `launch.retry` is `stopped`."""
        return "stopped" if self.state == "pending" and self.error else self.state


@dataclass
class Sweep:
    """Open sweep directory, with the content of its `sweep.json`."""

    path: Path
    experiment: str
    created: str
    """Time of creation, UTC."""
    cwd: str
    """Working directory of the launch command, to which relative paths of data refer."""
    argv: list[str]
    """Command line of the launch command."""
    targets: list[str]
    """Prefixes of `_target_` that the launch command trusted; later commands must be given them again."""
    launch: dict[str, Any]
    """Values of `launch` with which runs were last started."""
    jobs: list[Job] = field(default_factory=list)

    @classmethod
    def create(cls, path: Path | str | None, runs: "Sequence[Planned]", launch: LaunchConfig) -> "Sweep":
        """Make the directory with all run directories and `sweep.json`; it gets its name when it is complete.

        Without a path, a new one in `sweeps/` is chosen. There is at least one run.

        Raises:
            ConfigError: The directory exists or cannot be made.
        """
        check_launch(launch)
        path = Path(path or default_sweep_dir(runs[0].config.experiment)).absolute()
        if _UNSAFE.search(str(path)):
            raise ConfigError(f"sweep_dir: expected a path without line breaks and ${{, got {str(path)!r}")
        check_free(path, "sweep_dir")
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
        with made_aside(path, "sweep_dir") as sweep.path:
            for job, run in zip(sweep.jobs, runs, strict=True):
                run.make_directory(sweep.run_dir(job), path.name, git)
            sweep.save()
        sweep.path = path
        return sweep

    @classmethod
    def open(cls, path: Path | str) -> "Sweep":
        """Read the sweep in an existing directory.

        Raises:
            ConfigError: `path` is no sweep directory, or its `sweep.json` is damaged.
        """
        path = Path(path).absolute()
        try:
            content = read_json(path / SWEEP, MAX_SWEEP_BYTES)
            jobs = [read_record(Job, job) for job in content["jobs"]]
            sweep = read_record(cls, content, path=path, jobs=jobs)
        except FileNotFoundError:
            hint = ""
            if (path / META).is_file():
                hint = f"; this is a run, which {command('train', 'resume=RUN_DIR')} continues"
            raise ConfigError(f"{path}: expected a sweep's directory (one with a {SWEEP}){hint}") from None
        except (OSError, ConfigError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path / SWEEP}: expected the record of a sweep ({error})") from error
        if not jobs:
            raise ConfigError(f"{path / SWEEP}: expected at least one job")
        sweep._check_record()
        return sweep

    def _check_record(self) -> None:
        """Refuse a record whose paths leave the directory, or whose values may be more than values; it is untrusted.

        Raises:
            ConfigError: The message names the file and the value.
        """
        if _UNSAFE.search(str(self.path)):
            raise ConfigError(f"{str(self.path)!r}: expected a path without line breaks and ${{")
        record = self.path / SWEEP
        if re.search(r"[\x00-\x1f\x7f]", self.cwd) or not Path(self.cwd).is_absolute():
            raise ConfigError(
                f"{record}: cwd: expected an absolute path without line breaks, got {self.cwd!r}"
            )
        for target in self.targets:
            if not re.fullmatch(r"[\w.]+", target) and not is_trust(target):
                raise ConfigError(f"{record}: targets: expected the names of modules, got {target!r}")
        for job in self.jobs:
            if not re.fullmatch(r"[\w.-]+", job.run_dir) or job.run_dir in (".", ".."):
                raise ConfigError(f"{record}: expected a name under {self.path}, got {job.run_dir!r}")
            if self.run_dir(job).is_symlink():
                raise ConfigError(f"{self.run_dir(job)}: expected a directory of its own, this is a link")
        self.launch_config()

    def run_dir(self, job: Job) -> Path:
        """Return the path of the job's run directory."""
        return self.path / job.run_dir

    def save(self) -> None:
        """Write `sweep.json` atomically."""
        content = {key: value for key, value in asdict(self).items() if key != "path"}
        write_atomically(self.path / SWEEP, json.dumps(content, indent=2) + "\n", make_folder=False)

    def save_if_possible(self) -> bool:
        """Write `sweep.json` and return True, or print a warning, because states are found from the run directories."""
        try:
            self.save()
        except OSError as error:
            print_text(f"warning: {error.filename}: cannot be written: {error.strerror}", error=True)
            return False
        return True

    def observe(self, held: Mapping[int, str]) -> None:
        """Update the state of every job from its run directory; `held` is the result of `Backend.held`."""
        for job in self.jobs:
            self.observe_job(job, held.get(job.number))

    def observe_job(self, job: Job, held: str | None = None) -> None:
        """Update the state of one job from its run directory; `held` is its state in the backend, if it has one."""
        run_dir = self.run_dir(job)
        try:
            attempts = read_attempts(run_dir)
        except ConfigError as error:  # a damaged record concerns only this job, not the sweep
            job.state, job.error = held or "failed", str(error)
            return
        last = attempts[-1] if attempts else None
        job.attempts = len(attempts)
        job.started, job.ended = (last.started, last.ended) if last else (None, None)
        job.step = last_step(run_dir / METRICS)
        job.state, job.error = _state(job, last, held, run_dir)

    def missing(self, held: Mapping[int, str]) -> list[Job]:
        """Return the jobs to start: all that are not done and are not queued or running in the backend `held`."""
        return [job for job in self.jobs if job.state in ("pending", "failed") and job.number not in held]

    def require_directories(self, jobs: Iterable[Job]) -> None:
        """Refuse jobs whose directory is missing; with it the configuration of the run is lost.

        Raises:
            ConfigError: A directory or its configuration is missing; names the first one.
        """
        for job in jobs:
            path = self.run_dir(job) / CONFIG
            if not path.exists():
                raise ConfigError(
                    f"{path} is missing: expected the directories of all runs of the sweep; put it back, or start its"
                    " run in a new sweep"
                )

    @contextmanager
    def driving(self) -> Iterator[None]:
        """Hold the sweep's lock within the context, so that only one launch command at a time starts its runs.

        Raises:
            SweepInUse: Another launch command holds the lock.
        """
        descriptor = take_file_lock(self.path / LOCK, 0.5)
        if descriptor is None:
            raise SweepInUse(
                f"{self.path}: another launch command is using this sweep; wait for it, or stop it"
            )
        try:
            yield
        finally:
            os.close(descriptor)

    def launch_config(self) -> LaunchConfig:
        """Return the recorded values of `launch` with which runs were last started.

        Raises:
            ConfigError: The recorded values are invalid.
        """
        try:
            launch = read_record(LaunchConfig, self.launch)
            check_launch(launch, recorded=True)
        except (TypeError, ConfigError) as error:
            key = "launch: " if isinstance(error, TypeError) else ""
            raise ConfigError(f"{self.path / SWEEP}: {key}{error}") from error
        return launch

    def retry_command(self, allowed: Sequence[str] = (), *arguments: str) -> str:
        """Return the command that starts the remaining runs, with `allowed` as trusted prefixes of `_target_`."""
        return command("retry", path_argument(self.path), *trust(allowed), *arguments)


def _state(job: Job, last: Attempt | None, held: str | None, run_dir: Path) -> tuple[str, str | None]:
    if held is not None:
        return held, None
    # A run that wrote its report after the last step is done, even without a recorded end of its attempt.
    is_finished = (run_dir / "report" / "index.html").is_file() and job.step >= job.steps
    if (last is not None and last.exit_code == 0) or is_finished:
        return "done", None if (run_dir / METRICS).exists() else f"{METRICS} is missing"
    if last is None:
        return "pending", None
    if last.exit_code is None:
        return "failed", last.error or "its process ended and left no exit code (killed?)"
    if last.exit_code == EXIT_STOPPED or last.stopped:
        saved = saved_step(run_dir)
        note = f"stopped at step {job.step}" if saved is None else f"stopped, saved at step {saved}"
        return "pending", note
    return "failed", last.error


def default_sweep_dir(experiment: str) -> Path:
    """Return a new path for a sweep: `sweeps/<UTC date-time>_<experiment>_<6 hex>`."""
    return Path("sweeps") / default_run_dir(experiment).name


def plan_jobs(runs: "Sequence[Planned]", earlier: Sequence[Job] = ()) -> list[Job]:
    """Return one job per run, in order; each directory is named after the overrides that not all runs share.

    The numbers go on behind those of the `earlier` jobs, which the sweep has already.
    """
    if not runs:
        return []
    typed = [*(job.overrides for job in earlier), *(run.overrides for run in runs)]
    shared = set(typed[0]).intersection(*typed)
    width = len(str(len(earlier) + len(runs) - 1))
    jobs = []
    for number, run in enumerate(runs, start=len(earlier)):
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
    """Return overrides as parts of a file name, such as `decay_0.9` for `ema.decay=0.9`.

    If two keys end in the same word, the full keys are used.
    """
    split = [override.lstrip("+~").partition("=") for override in overrides]
    leaves = [key.rpartition(".")[2] for key, _, _ in split]
    return [
        re.sub(r"[^A-Za-z0-9.-]+", "_", f"{leaf if leaves.count(leaf) == 1 else key}_{value}").strip("_")
        for (key, _, value), leaf in zip(split, leaves, strict=True)
    ]


def failure(sweep: Sweep, job: Job) -> str:
    """Return the name of a failed job, the cause, and the file with all its output."""
    return f"{job.run_dir}: {job.error}; full output: {os.path.relpath(sweep.run_dir(job) / LOG)}"
