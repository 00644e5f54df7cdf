"""`launch=slurm`: runs on a cluster, submitted by submitit (github.com/facebookincubator/submitit). No torch here.

A run is one Slurm job with one task a node; each task starts torchrun, and torchrun the node's processes. The driver
submits and leaves. Ahead of the time limit, or preempted, the run saves and the job goes back into the queue; it starts
again by the very same command, which carries the run on from its newest checkpoint.
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

from launch.sweeps.backends.base import run_command, shutdown_timeout
from launch.sweeps.config import LaunchConfig
from launch.sweeps.directory import Job, Sweep
from launch.sweeps.signals import send_signal
from trainer.errors import EXIT_STOPPED, ConfigError

FOLDER = "slurm"
"""Under the sweep: submitit's scripts, pickles and logs, by job id."""
POLL_S = 0.2
FIRST_PORT, PORTS = 20_000, 20_000
"""Rendezvous ports: jobs that share a node get different ones by their ids."""
REQUEUES = 1000
"""Times that a job may go back into the queue after its time limit."""
ELSEWHERE = "start this where a cluster is, or choose launch=local (this machine) or launch=print (shows the commands)"
"""The ways out where there is no cluster."""
UNREACHED = (
    "unable to contact",
    "contact slurm controller",
    "configuration source",
    "timed out",
    "connection failure",
    "connection refused",
)
"""In what Slurm says, in small letters, where there is no cluster or it does not answer."""
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")


class Slurm:
    """Jobs in the queue of the cluster whose `sbatch` is on the path."""

    def __init__(self, launch: LaunchConfig) -> None:
        """Take the settings; the cluster is not asked anything yet."""
        self._launch = launch
        self._gpus_per_node = 0

    def check(self, device: str) -> None:
        """Refuse what Slurm would refuse, and a machine that can submit nothing."""
        if shutil.which("sbatch") is None:
            raise ConfigError(
                f"launch: launch=slurm looks for sbatch on the path, and found none; {ELSEWHERE}"
            )
        try:
            import submitit  # noqa: F401
        except ImportError as error:
            install = "pip install -c constraints.txt -e '.[slurm]'"
            raise ConfigError(f"launch: launch=slurm needs submitit: {install}") from error
        gpus = self._launch.gpus_per_node
        if gpus is None:
            gpus = 0 if device == "cpu" else self._launch.processes_per_node
        self._gpus_per_node = gpus
        launch = self._launch
        asked = {
            "nodes": launch.nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": launch.cpus_per_process * launch.processes_per_node,
            "time": launch.time_min,
            "partition": launch.partition,
            "account": launch.account,
            "qos": launch.qos,
            "mem": f"{launch.mem_gib}G" if launch.mem_gib else None,
            "gpus-per-node": gpus or None,
            **further_options(launch),
        }
        options = [
            f"--{key}" if value is True else f"--{key}={value}"
            for key, value in asked.items()
            if value is not None
        ]
        _asked("sbatch", "--test-only", *options, "--wrap=true", advice=ELSEWHERE)

    def start(self, sweep: Sweep, jobs: Sequence[Job], allowed: Sequence[str]) -> bool:
        """Submit the jobs; see `Backend.start`."""
        for job in jobs:
            task = Task(
                run_dir=sweep.run_dir(job),
                command=run_command(sweep.run_dir(job), self._launch, allowed),
                nodes=self._launch.nodes,
            )
            job.handle = self._executor(sweep, job).submit(task).job_id
            # On record before the next one: whoever comes after a crash must not submit it again.
            job.state, job.error = "pending", None
            sweep.save()
            print(f"submitted  {job.run_dir}  (job {job.handle})", flush=True)
        return False

    def held(self, sweep: Sweep) -> Mapping[int, str]:
        """Jobs that Slurm has in its queue.

        Raises:
            ConfigError: it does not answer.
        """
        if not any(job.handle for job in sweep.jobs):
            return {}
        listed = _asked(
            "squeue", "--noheader", "--format=%i %T", advice="its runs are in the hands of one: ask there"
        )
        states = dict(line.split() for line in listed.splitlines() if line.strip())
        found = {}
        for job in sweep.jobs:
            state = states.get(job.handle or "")
            if state is not None and state not in ENDED:
                found[job.number] = "running" if state in ("RUNNING", "COMPLETING") else "pending"
        return found

    def _executor(self, sweep: Sweep, job: Job) -> Any:
        import submitit

        launch = self._launch
        executor = submitit.SlurmExecutor(folder=sweep.path / FOLDER / "%j", max_num_timeout=REQUEUES)
        asked: dict[str, Any] = {
            "job_name": f"{sweep.path.name}/{job.run_dir}"[:120],
            "nodes": launch.nodes,
            "ntasks_per_node": 1,
            "cpus_per_task": launch.cpus_per_process * launch.processes_per_node,
            "time": launch.time_min,
            "signal_delay_s": launch.signal_delay_s,
            "stderr_to_stdout": True,
            "setup": [
                *launch.setup,
                f"cd {shlex.quote(sweep.cwd)}",
                "export {}={}".format(*shutdown_timeout(launch)),
                'export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"',
            ],
        }
        optional = {
            "partition": launch.partition,
            "account": launch.account,
            "qos": launch.qos,
            "mem": f"{launch.mem_gib}G" if launch.mem_gib else None,
            "gpus_per_node": self._gpus_per_node or None,
            "additional_parameters": further_options(launch) or None,
        }
        executor.update_parameters(**asked, **{key: value for key, value in optional.items() if value})
        return executor


def further_options(launch: LaunchConfig) -> dict[str, Any]:
    """`launch.sbatch` as sbatch has it: a flag is asked for by `true`, and left out by `false` or null."""
    return {
        key.replace("_", "-"): value
        for key, value in launch.sbatch.items()
        if value is not None and value is not False
    }


def _asked(*command: str, advice: str) -> str:
    """What a command of Slurm prints; `advice` is for whoever reaches no cluster.

    Raises:
        ConfigError: it refuses, or does not answer within a minute.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"launch: {command[0]}: {error} (no Slurm cluster reached); {advice}") from error
    except subprocess.CalledProcessError as error:
        # "Try sbatch --help" follows the cause.
        said = [line for line in error.stderr.splitlines() if line.strip() and not line.startswith("Try ")]
        reason = f"launch: {command[0]}: {(said or [str(error)])[-1].removeprefix(f'{command[0]}: ')}"
        reached = not any(words in reason.casefold() for words in UNREACHED)
        raise ConfigError(reason if reached else f"{reason} (no Slurm cluster reached); {advice}") from error
    return done.stdout


@dataclass
class Task:
    """What runs on each node of a job: torchrun, or on one node of one process the trainer itself.

    Pickled by name and plain values. The first node's task keeps the record (`launch.sweeps.attempt`).
    """

    run_dir: Path
    command: list[str]
    """As for one machine; `HOST` in it is the first node."""
    nodes: int
    _children: list["subprocess.Popen[bytes]"] = field(default_factory=list, repr=False)

    def __call__(self) -> int:
        """Run to the end; returns the exit code, 75 if it was stopped after saving.

        Raises:
            RuntimeError: it failed; Slurm then calls the job failed.
        """
        # What a cluster tells this task alone (a preemption, under cgroups) the run must hear, too.
        signal.signal(signal.SIGTERM, lambda *_: self._stop())
        child = subprocess.Popen(self._full_command(), stdin=subprocess.DEVNULL)
        self._children.append(child)
        while child.poll() is None:
            # Not wait(): `checkpoint` interrupts this very thread, and would wait for a lock that wait() holds.
            time.sleep(POLL_S)
        self._children.clear()
        code = child.returncode
        # torchrun answers a signal with an exit code of its own; only the first node knows whether there was one.
        if _is_first_node() and code not in (0, EXIT_STOPPED) and code >= 0 and not self._was_stopped():
            raise RuntimeError(
                f"the run failed with exit code {code}; all it printed: {self.run_dir}/output.log"
            )
        return code

    def checkpoint(self) -> Any:
        """Called by submitit ahead of the time limit: let the run save, then go back into the queue."""
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
        # The address that srun itself was started from: node names may be known to nobody but Slurm.
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
        from launch.sweeps.attempt import read_attempts

        attempts = read_attempts(self.run_dir)
        return bool(attempts) and attempts[-1].stopped


def _is_first_node() -> bool:
    return os.environ.get("SLURM_PROCID", "0") == "0"
