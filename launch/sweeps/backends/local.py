"""`launch=local`: runs on this machine, several at a time, each in a slot with its own cores or GPUs.

Every run is started through `launch.sweeps.attempt`, in its own process session. So a run continues and its result is
recorded even if this process is killed.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from launch.sweeps.attempt import EXIT_TAKEN, INHERITED, keeper, running_on
from launch.sweeps.backends.base import import_variables, run_command, shutdown_timeout
from launch.sweeps.backends.gpus import lock_folder, release, take_gpus, visible_gpus
from launch.sweeps.config import LaunchConfig
from launch.sweeps.directory import Job, Sweep, failure
from launch.sweeps.signals import handling
from trainer.distributed.torchrun import outside_torchrun
from trainer.errors import ConfigError
from trainer.shell.terminal import PATIENT_SIGNALS

POLL_S = 0.1
"""Seconds between two checks of the running jobs."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Local:
    """Backend that runs jobs in slots on this machine.

    Jobs that an earlier, killed launch command left running keep their slots until they end. A GPU that a run of
    another sweep of this user has locked is not used; a job waits until enough are free.
    """

    def __init__(self, launch: LaunchConfig) -> None:
        """Store the settings; `check` computes the slots."""
        self._launch = launch
        self._gpus: list[str] = []
        self._slots = self._threads = 1
        self._started: dict[int, subprocess.Popen[bytes]] = {}
        self._running: dict[int, Job] = {}
        self._received: list[int] = []
        self._is_announced = False
        self._waits = False
        self._can_save = True

    def check(self, device: str) -> None:
        """Check that runs need one machine and, if it has GPUs, at most one process per GPU; compute the slots.

        The folder of GPU locks is made, so that an unusable one is refused before the sweep has a directory.
        """
        nodes, needed = self._launch.nodes, self._launch.processes_per_node
        if nodes != 1:
            raise ConfigError(f"launch.nodes: expected 1, got {nodes}; for several machines use launch=slurm")
        self._gpus = visible_gpus() if device != "cpu" else []
        if self._gpus and needed > len(self._gpus):
            raise ConfigError(
                f"launch.processes_per_node: expected at most the {len(self._gpus)} GPUs of this machine, got {needed}"
            )
        cores = len(os.sched_getaffinity(0))
        self._slots = self._launch.slots or max(1, (len(self._gpus) or cores) // needed)
        self._threads = max(1, cores // (self._slots * needed))
        if self._locks_gpus:
            lock_folder()

    def held(self, sweep: Sweep) -> Mapping[int, str]:
        """Return the running jobs: a process holds the lock, or an attempt on another machine has no recorded end."""
        return {job.number: "running" for job in sweep.jobs if running_on(sweep.run_dir(job))}

    def start(self, sweep: Sweep, jobs: Sequence[Job], allowed: Sequence[str]) -> bool:
        """Run the jobs, one per slot at a time, and wait for all running jobs; see `Backend.start`."""
        waiting = list(jobs)
        held = self.held(sweep)
        self._running = {job.number: job for job in sweep.jobs if job.number in held}
        for job in self._running.values():
            print(f"still running  {job.run_dir}", flush=True)
        with handling(STOP_SIGNALS, lambda number, frame: self._stop(sweep, number)):
            while self._running or (waiting and self._may_start):
                while waiting and self._may_start and len(self._running) < self._slots:
                    if not self._start(sweep, waiting[0], allowed):
                        break
                    del waiting[0]
                if not self._reap(sweep):
                    time.sleep(POLL_S)
                self._announce_stop()
        return bool(self._received)

    def _start(self, sweep: Sweep, job: Job, allowed: Sequence[str]) -> bool:
        """Start a job in a free slot; return whether it has a place, which needs GPUs that no other sweep uses."""
        taken = {running.handle for running in self._running.values()}
        slot = next(slot for slot in range(self._slots) if str(slot) not in taken)
        gpus, locks = self._slot_gpus(slot), {}
        if self._locks_gpus:
            others = [gpu for gpu in self._gpus if gpu not in gpus]
            found = take_gpus([*gpus, *others], len(gpus))
            if found is None:
                if not self._waits:
                    self._waits = True
                    print("waiting for GPUs: other runs of this user have locked them", flush=True)
                return False
            gpus, locks = list(found), found
        try:
            self._start_in(sweep, job, allowed, slot, gpus, list(locks.values()))
        finally:
            release(locks)
        return True

    def _start_in(
        self, sweep: Sweep, job: Job, allowed: Sequence[str], slot: int, gpus: list[str], locks: list[int]
    ) -> None:
        # Saved before the job starts: if this process is killed, the next one must not use the slot for another job.
        job.handle, job.state, job.error = str(slot), "running", None
        if not sweep.save_if_possible():  # the running jobs go on
            self._can_save, job.handle, job.state = False, None, "pending"
            return
        command = run_command(sweep.run_dir(job), self._launch, allowed)
        self._started[job.number] = subprocess.Popen(
            [sys.executable, "-m", "launch.sweeps.attempt", str(sweep.run_dir(job)), *command],
            cwd=sweep.cwd,
            env=self._environment(gpus) | {INHERITED: ",".join(map(str, locks))},
            pass_fds=locks,  # the locks are held as long as the run
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal reaches only this process, which then stops the runs
        )
        self._running[job.number] = job
        if self._received:  # the signal arrived during the start
            self._signal(sweep, job)
        names = f", GPU {','.join(gpus)}" if gpus else ""
        print(f"started  {job.run_dir}  (slot {slot}{names})", flush=True)

    def _environment(self, gpus: Sequence[str]) -> dict[str, str]:
        environment = outside_torchrun()
        environment.setdefault("OMP_NUM_THREADS", str(self._threads))
        environment.setdefault(*shutdown_timeout(self._launch))
        environment |= import_variables()
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        return environment

    def _slot_gpus(self, slot: int) -> list[str]:
        """Return the GPUs of a slot, none without GPUs; if slots need more GPUs than there are, slots share GPUs."""
        needed = self._launch.processes_per_node if self._gpus else 0
        return [self._gpus[(slot * needed + index) % len(self._gpus)] for index in range(needed)]

    @property
    def _locks_gpus(self) -> bool:
        """Whether each run has its GPUs for itself; with more `launch.slots` the user lets runs share them."""
        needed = self._slots * self._launch.processes_per_node
        return bool(self._gpus) and needed <= len(self._gpus)

    def _reap(self, sweep: Sweep) -> bool:
        """Record the jobs that have ended since the last call; return whether there were any."""
        ended = [job for job in self._running.values() if self._has_ended(sweep, job)]
        for job in ended:
            process = self._started.pop(job.number, None)
            if process is not None and process.returncode == EXIT_TAKEN:
                # An attempt of a killed launch command is still using the directory, so the job is running.
                continue
            del self._running[job.number]
            sweep.observe_job(job)
            done = sum(other.state == "done" for other in sweep.jobs)
            print(f"{_ending(sweep, job)}  [{done}/{len(sweep.jobs)} done]", flush=True)
        if ended:
            self._can_save &= sweep.save_if_possible()
        return bool(ended)

    @property
    def _may_start(self) -> bool:
        return not self._received and self._can_save

    def _has_ended(self, sweep: Sweep, job: Job) -> bool:
        process = self._started.get(job.number)
        if process is not None and process.poll() is None:
            return False
        # If the keeper was killed, the run may still be running.
        return running_on(sweep.run_dir(job)) is None

    def _stop(self, sweep: Sweep, number: int) -> None:
        # Nothing is printed here: the signal may arrive within a print, which cannot be entered twice.
        if self._received and number in PATIENT_SIGNALS:
            return
        self._received.append(number)
        for job in self._running.values():
            self._signal(sweep, job)

    def _announce_stop(self) -> None:
        if self._received and not self._is_announced:
            self._is_announced = True
            name = signal.Signals(self._received[0]).name
            print(f"{name}: the runs save and stop; a second signal ends them at once", flush=True)

    def _signal(self, sweep: Sweep, job: Job) -> None:
        process = self._started.get(job.number)
        if process is not None:
            process.send_signal(signal.SIGTERM)
            return
        other = keeper(sweep.run_dir(job))
        if other is not None:  # None if the keeper was killed; then no process can pass on the signal
            with suppress(ProcessLookupError):
                os.kill(other, signal.SIGTERM)


def _ending(sweep: Sweep, job: Job) -> str:
    if job.state == "failed":
        return f"failed   {failure(sweep, job)}"
    return f"{job.shown_state:<7}  {job.run_dir}  step {job.step}/{job.steps}"
