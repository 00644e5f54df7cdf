"""Run the command of `trainer.on_checkpoint` beside the training, after a checkpoint was committed."""

import os
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from trainer.config.on_checkpoint import KEY, words_of
from trainer.distributed.torchrun import outside_torchrun
from trainer.errors import ConfigError, message_of
from trainer.rundir.files import open_own

LOG = "on_checkpoint.log"
"""File of the run directory to which the output of all commands is appended."""
HURRY_S = 10.0
"""Longest wait for the commands of a run that was stopped, in seconds; the other ranks wait 20 for rank 0, and torchrun
kills its ranks after 30."""
POLL_S = 0.1
"""Seconds between two looks at a signal while the run waits for its last commands."""


class OnCheckpoint:
    """The user's command, in one process at a time. Make it on rank 0 only.

    While a command runs, the newest checkpoint waits for its end. Checkpoints between them are skipped with a warning.
    A failure is a warning. The process has a session of its own, so no signal to the run reaches it.
    """

    def __init__(self, command: str, run_dir: Path, warn: Callable[[str], object]) -> None:
        """Prepare the commands of a command line that `is_command` has checked; `warn` shows a message to the user."""
        self._command, self._run_dir, self._warn = command, run_dir, warn
        self._running: tuple[int, subprocess.Popen[bytes]] | None = None
        self._waiting: tuple[int, Path] | None = None
        self.held: tuple[Path, ...] = ()
        """Checkpoints that a command uses or will use. Replaced as a whole, because another thread reads it."""

    def committed(self, step: int, path: Path) -> None:
        """Start the command for a checkpoint, or let the checkpoint wait for the running command."""
        self.poll()
        if self._running is None:
            self._start(step, path)
            return
        if self._waiting is not None:
            self._warn(
                f"warning: {KEY}: skips step {self._waiting[0]}, because the command of step {self._running[0]} still"
                f" runs; step {step} is the next"
            )
        self._waiting = step, path
        self.held = (self.held[0], path)

    def poll(self) -> None:
        """Report a command that has ended and start the one that waits; never wait."""
        if self._running is None or (code := self._running[1].poll()) is None:
            return
        step, waiting = self._running[0], self._waiting
        self._running = self._waiting = None
        if code:
            how = f"exit code {code}" if code > 0 else f"signal {-code}"
            self._warn(f"warning: {KEY}: {how} at step {step}; its output is in {self._run_dir / LOG}")
        if waiting is None:
            self.held = ()
        else:
            self._start(*waiting)

    def finish(self, patience_s: float, is_hurried: Callable[[], bool]) -> None:
        """Wait for the running command and the one that waits; leave what is not done in time.

        Args:
            patience_s: longest wait in seconds.
            is_hurried: function that returns whether the run was asked to stop; then `HURRY_S` limits the wait.
        """
        begin = time.monotonic()
        while self._running is not None:
            left = (min(HURRY_S, patience_s) if is_hurried() else patience_s) - (time.monotonic() - begin)
            if left <= 0:
                step, process = self._running
                dropped = f"; that of step {self._waiting[0]} was not started" if self._waiting else ""
                self._warn(
                    f"warning: {KEY}: the command of step {step} is left running as process {process.pid}{dropped}"
                )
                return
            try:
                self._running[1].wait(min(POLL_S, left))
            except subprocess.TimeoutExpired:
                continue
            self.poll()

    def _start(self, step: int, path: Path) -> None:
        self.held = (path,)
        words = words_of(
            self._command, path=os.path.abspath(path), step=step, run_dir=os.path.abspath(self._run_dir)
        )
        try:
            descriptor = open_own(self._run_dir / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            with open(descriptor, "ab", buffering=0) as log:
                log.write(os.fsencode(f"step {step}: {shlex.join(words)}\n"))
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=outside_torchrun(),
                    start_new_session=True,
                )
        except (OSError, ConfigError) as error:
            self.held = ()
            reason = error.strerror if isinstance(error, OSError) else message_of(error)
            self._warn(f"warning: {KEY}: {words[0]!r} cannot be started at step {step}: {reason}")
            return
        self._running = step, process
