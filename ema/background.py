"""Averaging beside the training: in a thread for averages kept on the CPU, or on a stream of its own.

An average only reads the live parameters, so it may be updated until the next optimizer step writes them. That step
waits (on the device, not on the host) by a hook on all optimizers of torch; code that reads a shadow waits first.
Buffers are another matter: the next forward writes them, so they are read in the order of the training.
"""

import os
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

_all: "weakref.WeakSet[Background]" = weakref.WeakSet()


def release_all_live() -> None:
    """Live weights of any model may be written after this, in the order of the current stream."""
    for background in list(_all):
        background.release_live()


class Background:
    """What is under way for the averages of one model; at most one update at a time."""

    def __init__(self) -> None:
        self._worker: ThreadPoolExecutor | None = None
        self._job: Future[None] | None = None
        self._process = os.getpid()
        self._stream: Any = None
        self._event: Any = None
        """On the side stream, after the parameters were read (and after the shadows were written, if there)."""
        _all.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing is under way in a copy."""
        self.wait()
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def __del__(self) -> None:
        # Memory that the side stream still uses goes back to the stream that made it.
        self.release_live()

    def offload(
        self,
        at_once: tuple[list[Tensor], list[Tensor]],
        beside: tuple[list[Tensor], list[Tensor]],
        job: Callable[[], None],
    ) -> None:
        """Copy live tensors to the CPU, then do `job` in a thread, without waiting for either.

        Call `wait` first: the job before may still read the copies.

        Args:
            at_once: where to, and what, in the order of the current stream.
            beside: likewise, on the side stream. Tensors on the CPU are copied before this returns.
            job: what to do when both are copied.
        """
        device = next(
            (live.device for _, lives in (at_once, beside) for live in lives if not live.is_cpu), None
        )
        if at_once[0]:
            torch._foreach_copy_(*at_once, non_blocking=True)
        event = None
        if device is not None:
            with self._beside(device):
                if beside[0]:
                    torch._foreach_copy_(*beside, non_blocking=True)
                event = self._mark(device)
        elif beside[0]:
            torch._foreach_copy_(*beside)
        if self._worker is None:
            # A thread begins with the machine's number of threads, not with the program's.
            self._worker = ThreadPoolExecutor(
                1, "ema", initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
            )
        self._job = self._worker.submit(_after, event, job)

    def overlap(
        self, device: torch.device, flag: Tensor | None, job: Callable[[Tensor | None], None]
    ) -> None:
        """Do `job(flag)` on the side stream of `device`, after what the current stream has been given so far."""
        flag = None if flag is None else flag.clone()
        with self._beside(device):
            if flag is not None:
                flag.record_stream(self._stream)
            job(flag)
            self._mark(device)

    def wait(self) -> None:
        """Shadows may be read and written after this: the host waits for the thread, streams for the side stream.

        Raises:
            Exception: what the thread's job raised.
        """
        if self._process != os.getpid():
            # After a fork the thread is in the other process, and so is what it was given.
            self._worker, self._job, self._process = None, None, os.getpid()
        job = self._job
        if job is not None:
            try:
                job.result()
            finally:
                # Not done if a signal interrupted the wait: the next reader waits again.
                if job.done():
                    self._job = None
        self.release_live()

    def release_live(self) -> None:
        """Live weights may be written after this, in the order of the current stream. The host does not wait."""
        if self._event is not None:
            device = self._stream.device
            torch.get_device_module(device).current_stream(device).wait_event(self._event)

    def _beside(self, device: torch.device) -> AbstractContextManager[Any]:
        module = torch.get_device_module(device)
        if self._stream is None:
            self._stream = module.Stream(device)
            _call_before_optimizer_steps(self)
        self._stream.wait_stream(module.current_stream(device))
        return module.stream(self._stream)

    def _mark(self, device: torch.device) -> Any:
        self._event = torch.get_device_module(device).Event()
        self._event.record(self._stream)
        return self._event


def _after(event: Any, job: Callable[[], None]) -> None:
    if event is not None:
        event.synchronize()
    with torch.no_grad():
        job()


def _call_before_optimizer_steps(background: Background) -> None:
    reference = weakref.ref(background)

    def hook(*_: Any) -> None:
        alive = reference()
        if alive is not None:
            alive.release_live()

    weakref.finalize(background, register_optimizer_step_pre_hook(hook).remove)
