"""`launch=slurm`: runs on a cluster, submitted by submitit (github.com/facebookincubator/submitit). No torch here.

A run is one Slurm job with one task per node. Each task starts torchrun, which starts the processes of its node. The
launch command submits the jobs and exits. Before the time limit, or when the job is preempted, the run saves and the
job goes back into the queue. It starts again with the same command, which continues from the newest checkpoint.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.sweeps.attempt import read_attempts
from launch.sweeps.backends.base import import_variables, run_command, shutdown_timeout
from launch.sweeps.config import LaunchConfig, gpus_of
from launch.sweeps.directory import Job, Sweep
from launch.sweeps.signals import send_signal
from trainer.errors import EXIT_STOPPED, ConfigError

FOLDER = "slurm"
"""Folder in the sweep's directory for submitit's scripts, pickles and logs, by job id."""
POLL_S = 0.2
"""Seconds between two checks of the command."""
FIRST_PORT, PORTS = 20_000, 20_000
"""Range of rendezvous ports; a job's id chooses one, so that jobs on the same node get different ports."""
REQUEUES = 1000
"""How many times a job may go back into the queue after its time limit."""
ELSEWHERE = (
    "use a machine of a cluster, or choose launch=local (this machine) or launch=print (shows the commands)"
)
"""Advice for a machine without a cluster."""
UNREACHED = (
    "unable to contact",
    "contact slurm controller",
    "configuration source",
    "timed out",
    "connection failure",
    "connection refused",
)
"""Parts of Slurm's error messages, in lower case, if there is no cluster or it does not answer."""
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
"""States of jobs that have ended but may still be in Slurm's list."""


class Slurm:
    """Backend that submits jobs to a Slurm cluster with the `sbatch` on the path."""

    def __init__(self, launch: LaunchConfig) -> None:
        """Store the settings; no command of Slurm is called yet."""
        self._launch = launch
        self._gpus_per_node = 0

    def check(self, device: str) -> None:
        """Check that submitit is installed and that Slurm accepts a job with these settings."""
        if shutil.which("sbatch") is None:
            raise ConfigError(f"launch: launch=slurm needs sbatch, which is not on the path; {ELSEWHERE}")
        try:
            import submitit  # noqa: F401
        except ImportError as error:
            install = "pip install -c constraints.txt -e '.[slurm]'"
            raise ConfigError(f"launch: launch=slurm needs submitit: {install}") from error
        self._gpus_per_node = gpus_of(self._launch, device)
        settings = {key.replace("_", "-"): value for key, value in self._options().items()}
        _rehearse(settings | further_options(self._launch), self._gpus_per_node)

    def start(self, sweep: Sweep, jobs: Sequence[Job], allowed: Sequence[str]) -> bool:
        """Submit the jobs; see `Backend.start`."""
        if (sweep.path / FOLDER).is_symlink():
            raise ConfigError(f"{sweep.path / FOLDER}: expected a directory of its own, this is a link")
        for job in jobs:
            task = Task(
                run_dir=sweep.run_dir(job),
                command=run_command(sweep.run_dir(job), self._launch, allowed),
                nodes=self._launch.nodes,
            )
            job.handle = self._executor(sweep, job).submit(task).job_id
            # Saved before the next job: if this process is killed, launch.retry must not submit this job again.
            job.state, job.error = "pending", None
            sweep.save()
            print(f"submitted  {job.run_dir}  (job {job.handle})", flush=True)
        return False

    def held(self, sweep: Sweep) -> Mapping[int, str]:
        """Return the state of each job in Slurm's queue, by the job's number.

        Raises:
            ConfigError: Slurm does not answer.
        """
        if not any(job.handle for job in sweep.jobs):
            return {}
        listed = _slurm_output(
            "squeue", "--noheader", "--format=%i %T", advice="run this command where the sweep was submitted"
        )
        states = dict(line.split() for line in listed.splitlines() if line.strip())
        held = {}
        for job in sweep.jobs:
            state = states.get(job.handle or "")
            if state is not None and state not in ENDED:
                held[job.number] = "running" if state in ("RUNNING", "COMPLETING") else "pending"
        return held

    def _executor(self, sweep: Sweep, job: Job) -> Any:
        import submitit

        executor = submitit.SlurmExecutor(folder=sweep.path / FOLDER / "%j", max_num_timeout=REQUEUES)
        parameters = {
            **self._options(),
            "job_name": f"{sweep.path.name}/{job.run_dir}"[:120],
            "signal_delay_s": self._launch.signal_delay_s,
            "stderr_to_stdout": True,
            "gpus_per_node": self._gpus_per_node or None,
            "additional_parameters": further_options(self._launch) or None,
            "setup": [
                *self._launch.setup,
                f"cd {shlex.quote(sweep.cwd)}",
                "export {}={}".format(*shutdown_timeout(self._launch)),
                *(f"export {name}={shlex.quote(value)}" for name, value in import_variables().items()),
            ],
        }
        executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
        return executor

    def _options(self) -> dict[str, Any]:
        """Return the options of the rehearsal and of the submission by submitit's names; None is the default."""
        launch = self._launch
        return {
            "nodes": launch.nodes,
            "ntasks_per_node": 1,
            "cpus_per_task": launch.cpus_per_process * launch.processes_per_node,
            "time": launch.time_min,
            "partition": launch.partition,
            "account": launch.account,
            "qos": launch.qos,
            "mem": f"{launch.mem_gib}G" if launch.mem_gib else None,
        }


def further_options(launch: LaunchConfig) -> dict[str, Any]:
    """Return `launch.sbatch` with the names of sbatch's options; options with the value false or null are left out.

    The value true means an option without a value.
    """
    return {
        key.replace("_", "-"): value
        for key, value in launch.sbatch.items()
        if value is not None and value is not False
    }


def _rehearse(settings: Mapping[str, Any], gpus: int) -> None:
    """Let sbatch check a job without submitting it; `settings` are its options without dashes, None leaves one out.

    Raises:
        ConfigError: Slurm refuses the job. If it would accept the job without GPUs, the message names the key of these.
    """
    options = [
        f"--{key}" if value is True else f"--{key}={value}"
        for key, value in settings.items()
        if value is not None
    ]
    rehearsal = ("sbatch", "--test-only", *options)
    if not gpus:
        _slurm_output(*rehearsal, "--wrap=true", advice=ELSEWHERE)
        return
    try:
        _slurm_output(*rehearsal, f"--gpus-per-node={gpus}", "--wrap=true", advice=ELSEWHERE)
    except ConfigError as error:
        try:
            _slurm_output(*rehearsal, "--wrap=true", advice=ELSEWHERE)
        except ConfigError:
            raise error from None  # GPUs are not the cause
        reason = str(error).removeprefix("launch: ")
        raise ConfigError(
            f"launch.gpus_per_node: expected a number of GPUs that the nodes have, got {gpus} ({reason});"
            " for runs without a GPU set trainer.device=cpu or launch.gpus_per_node=0"
        ) from error


def _slurm_output(*command: str, advice: str) -> str:
    """Run a command of Slurm and return its output; `advice` ends the error message if no cluster answers.

    Raises:
        ConfigError: The command fails, or does not end within 60 seconds.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"launch: {command[0]}: {error} (no Slurm cluster reached); {advice}") from error
    except subprocess.CalledProcessError as error:
        # The line after the cause can be "Try sbatch --help".
        lines = [line for line in error.stderr.splitlines() if line.strip() and not line.startswith("Try ")]
        reason = f"launch: {command[0]}: {(lines or [str(error)])[-1].removeprefix(f'{command[0]}: ')}"
        reached = not any(words in reason.casefold() for words in UNREACHED)
        raise ConfigError(reason if reached else f"{reason} (no Slurm cluster reached); {advice}") from error
    return done.stdout


@dataclass
class Task:
    """Task on each node of a Slurm job, which runs torchrun or, for a single process, the trainer.

    submitit pickles it. The task of the first node records the attempt (`launch.sweeps.attempt`).
    """

    run_dir: Path
    command: list[str]
    """Result of `run_command`; its placeholder `HOST` is replaced by the address of the first node."""
    nodes: int
    """Number of nodes of the job, at least 1."""
    _children: list["subprocess.Popen[bytes]"] = field(default_factory=list, repr=False)

    def __call__(self) -> int:
        """Run the command to its end and return its exit code, 75 if it was stopped after saving.

        Raises:
            RuntimeError: The run failed; Slurm then marks the job as failed.
        """
        # Some clusters send the signal of a preemption only to this task, so it is passed on to the run.
        signal.signal(signal.SIGTERM, lambda *_: self._stop())
        child = subprocess.Popen(self._full_command(), stdin=subprocess.DEVNULL)
        self._children.append(child)
        while child.poll() is None:
            # Not wait(): `checkpoint` runs as a signal handler in this thread, and would wait for its lock for ever.
            time.sleep(POLL_S)
        self._children.clear()
        code = child.returncode
        # After a signal, torchrun returns its own exit code. Only the first node has the record of the signal.
        if _is_first_node() and code not in (0, EXIT_STOPPED) and code >= 0 and not self._was_stopped():
            raise RuntimeError(
                f"the run failed with exit code {code}; full output: {self.run_dir}/output.log"
            )
        return code

    def checkpoint(self) -> Any:
        """Let the run save and end, and return its next submission; submitit calls this before the time limit."""
        from submitit.helpers import DelayedSubmission

        self._stop()
        for child in self._children:
            child.wait()
        return DelayedSubmission(Task(self.run_dir, self.command, self.nodes))

    def _stop(self) -> None:
        for child in self._children:
            send_signal(child, signal.SIGUSR2)

    def _full_command(self) -> list[str]:
        job = os.environ["SLURM_JOB_ID"]
        # The address from which srun was started is used, because the network may not resolve Slurm's node names.
        host = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
        port = FIRST_PORT + int(job) % PORTS
        command = [part.replace("HOST:29400", f"{host}:{port}") for part in self.command]
        if self.nodes > 1:
            place = command.index("--rdzv-backend=c10d")
            command.insert(place, f"--rdzv-id={job}-{os.environ.get('SLURM_RESTART_COUNT', '0')}")
        if not _is_first_node():
            return command
        return [sys.executable, "-m", "launch.sweeps.attempt", str(self.run_dir), *command]

    def _was_stopped(self) -> bool:
        attempts = read_attempts(self.run_dir)
        return bool(attempts) and attempts[-1].stopped


def _is_first_node() -> bool:
    return os.environ.get("SLURM_PROCID", "0") == "0"
