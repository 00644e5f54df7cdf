"""Stopping in good order: a signal to any rank becomes one decision that all ranks take at the same step."""

import os
import signal
import time
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopSignal:
    """Within it, SIGTERM, SIGINT and SIGUSR2 ask the loop to stop instead of ending the process.

    SIGUSR2 is what a scheduler sends ahead of a time limit (NCCL may catch SIGUSR1, and torchrun dies of it). A
    second SIGINT or SIGTERM acts as it would have without us, for a user who will not wait.

    Collectives: entering makes a gloo group of all ranks if there is more than one; `requested` starts one
    asynchronous all-reduce of one byte on it. The group is our own, so the byte never waits behind gradients.
    """

    def __init__(self, *, timeout_s: float | None = None, repeat_after_s: float = 1.0) -> None:
        """Install nothing yet.

        Args:
            timeout_s: how long a vote waits for the other ranks; None is what torch takes for it.
            repeat_after_s: a further signal within this time of the first is the same request: a scheduler and
                torchrun may both deliver it.
        """
        self.received: signal.Signals | None = None
        """First signal that reached this rank."""
        self._timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
        self._repeat_after_s = repeat_after_s
        self._received_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}
        self._group: dist.ProcessGroup | None = None
        self._votes = torch.zeros(1, dtype=torch.uint8)
        self._pending: dist.Work | None = None
        self._agreed = False

    def __enter__(self) -> Self:
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()
        # After an error the other ranks may never join: waiting for them would hide the error behind a time-out.
        if self._group is not None and kind is None:
            if self._pending is not None:
                self._pending.wait()
            dist.destroy_process_group(self._group)
        self._pending = self._group = None

    def requested(self) -> bool:
        """Whether to stop after this step. Every rank calls this once a step.

        In one process the answer is the flag. With several ranks it is the vote started at the previous call: by now
        the step's gradients have met, so the vote has too and nothing is waited for. All ranks get the same answer at
        the same step, one step after the first rank voted, and it stays.
        """
        if self._group is None:
            return self.received is not None
        if self._agreed:
            return True
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            self._agreed = bool(self._votes.item())
            if self._agreed:
                return True
        self._votes.fill_(self.received is not None)
        self._pending = dist.all_reduce(self._votes, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), now
        elif number != signal.SIGUSR2 and now - self._received_at >= self._repeat_after_s:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
