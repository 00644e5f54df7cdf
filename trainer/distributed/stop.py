"""Stop all ranks after the same step when one has received a signal; save on all by the clock of rank 0."""

import os
import signal
import time
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from trainer.distributed.processes import group_apart
from trainer.shell.terminal import PATIENT_SIGNALS, STOP_SIGNALS, without_ignored_hangup


class StopSignal:
    """Context in which SIGTERM, SIGINT, SIGHUP and SIGUSR2 request a stop of the loop instead of ending the process.

    SIGHUP comes when a terminal is closed or a connection is lost; under `nohup` it stays ignored. SIGUSR2 is for a
    scheduler that sends a signal before its time limit. SIGUSR1 is not used, because NCCL may catch it, and it ends
    torchrun. A second SIGINT or SIGTERM acts as it would outside of this context, so that a user need not wait.

    Collectives: with several ranks, entering makes a gloo group of them and waits for all; `requested` starts one
    asynchronous all-reduce of two bytes on it. No other tensor uses this group, so they never wait for gradients.
    """

    def __init__(
        self,
        *,
        timeout_s: float | None = None,
        repeat_after_s: float = 1.0,
        save_after_s: float | None = None,
    ) -> None:
        """Prepare the context; the signal handlers are installed when it is entered.

        Args:
            timeout_s: seconds that a vote waits for the other ranks; None is torch's default.
            repeat_after_s: seconds after the first signal in which further signals have no effect, because a scheduler
                and torchrun may both deliver the same request.
            save_after_s: seconds between two saves by the clock of rank 0; None asks for no save.
        """
        self.received: signal.Signals | None = None
        """First signal that this rank received; None if there was none."""
        self.save_requested = False
        """Whether all ranks must save after this step, by the latest call of `requested`."""
        self._timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
        self._repeat_after_s = repeat_after_s
        self._received_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}
        self._group: dist.ProcessGroup | None = None
        self._save_after_s = save_after_s
        self._saved_at = time.monotonic()
        self._votes = torch.zeros(2, dtype=torch.uint8)
        """Whether to stop, and whether to save."""
        self._pending: dist.Work | None = None
        self._agreed = False

    def __enter__(self) -> Self:
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = group_apart(self._timeout)
        for number in without_ignored_hangup(STOP_SIGNALS):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()
        # After an error the other ranks may never vote. Waiting for them would end in a time-out that hides the error.
        if self._group is not None and kind is None:
            if self._pending is not None:
                self._pending.wait()
            dist.destroy_process_group(self._group)
        self._pending = self._group = None

    def requested(self, *, also: bool = False) -> bool:
        """Return whether the loop must stop after this step; every rank must call this once per step.

        One process stops after the step in which it received a signal. Several ranks use the vote that was started in
        the previous call. It costs no waiting, because the ranks have exchanged the gradients of a step since then. So
        all ranks return True at the same step, one step after the first rank voted for it, and at every later step.
        `save_requested` is set by the same vote, in which only rank 0 votes for a save. With `also`, this rank requests
        a stop for another reason than a signal.
        """
        wanted = also or self.received is not None
        if self._group is None:
            self._set_save_requested(self._is_save_due())
            return wanted
        if self._agreed:
            return True
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            self._agreed, save = map(bool, self._votes.tolist())
            self._set_save_requested(save)
            if self._agreed:
                return True
        self._votes[0] = wanted
        self._votes[1] = dist.get_rank() == 0 and self._is_save_due()
        self._pending = dist.all_reduce(self._votes, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return False

    def _is_save_due(self) -> bool:
        return self._save_after_s is not None and time.monotonic() - self._saved_at >= self._save_after_s

    def _set_save_requested(self, requested: bool) -> None:
        self.save_requested = requested
        if requested:
            self._saved_at = time.monotonic()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), now
        elif number not in PATIENT_SIGNALS and now - self._received_at >= self._repeat_after_s:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
