"""Averaging beside the training: in a thread for averages kept on the CPU, or on a stream of its own.

An average only reads the live weights, so it may be updated until the next optimizer step writes them. That step
waits (on the device, not on the host) by a hook on all optimizers of torch; whoever reads a shadow waits first.
"""

import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Background:
    """What is under way for the averages of one model; at most one update at a time."""

    def __init__(self) -> None:
        self._worker: ThreadPoolExecutor | None = None
        self._job: Future[None] | None = None
        self._stream: Any = None
        self._event: Any = None
        """On the side stream, after the live weights were read (and after the shadows were written, if there)."""

    def offload(self, stage: list[Tensor], lives: list[Tensor], job: Callable[[], None]) -> None:
        """Copy `lives` into `stage` on the CPU, then do `job` in a thread, without waiting for either.

        Waits for the job before it, which reads the same stage. Live tensors on the CPU are copied at once.

        Raises:
            Exception: what the job before it raised.
        """
        self.wait()
        device = next((live.device for live in lives if live.device.type != "cpu"), None)
        event = None
        if device is None:
            torch._foreach_copy_(stage, lives)
        else:
            with self._beside(device):
                torch._foreach_copy_(stage, lives, non_blocking=True)
                event = self._mark(device)
        if self._worker is None:
            # A thread begins with the machine's number of threads, not with the program's.
            self._worker = ThreadPoolExecutor(
                1, "ema", initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
            )
        self._job = self._worker.submit(_after, event, job)

    def overlap(self, device: torch.device, job: Callable[[], None]) -> None:
        """Do `job` on the side stream of `device`, after what the current stream has been given so far."""
        with self._beside(device):
            job()
            self._mark(device)

    def wait(self) -> None:
        """Shadows may be read and written after this: the host waits for the thread, streams for the side stream.

        Raises:
            Exception: what the thread's job raised.
        """
        job, self._job = self._job, None
        if job is not None:
            job.result()
        self.release_live()

    def release_live(self) -> None:
        """Live weights may be written after this, in the order of the current stream. The host does not wait."""
        if self._event is not None:
            torch.get_device_module(self._stream.device).current_stream(self._stream.device).wait_event(
                self._event
            )

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
