"""Updates in the background: in a thread for averages on the CPU, or on a separate stream of an accelerator.

An update only reads the live parameters, so it may run until the next optimizer step changes them. A hook on all
optimizers of torch makes that step wait, on the device and not on the host. Code that reads a shadow waits first.
Buffers are changed by the next forward already. So they are read on the current stream, before training continues.
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
    """Make the current stream wait until no update reads live weights; then the weights of all models may change."""
    for background in list(_all):
        background.release_live()


class Background:
    """The update that runs in the background for the averages of one model; at most one at a time."""

    def __init__(self) -> None:
        self._worker: ThreadPoolExecutor | None = None
        self._job: Future[None] | None = None
        self._process = os.getpid()
        self._stream: Any = None
        self._event: Any = None
        """Recorded on the side stream when the parameters have been read, and the shadows on the device written."""
        _all.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """Wait, and copy nothing: no update runs in a copy."""
        self.wait()
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def __del__(self) -> None:
        # The current stream may reuse memory that the side stream still reads, so it must wait.
        self.release_live()

    def offload(
        self,
        at_once: tuple[list[Tensor], list[Tensor]],
        beside: tuple[list[Tensor], list[Tensor]],
        job: Callable[[], None],
    ) -> None:
        """Copy live tensors to the CPU, then run `job` in a thread. The host waits for neither.

        Call `wait` first, because the previous job may still read the copies.

        Args:
            at_once: destinations and sources of the copies on the current stream.
            beside: destinations and sources of the copies on the side stream. Sources on the CPU are copied before this
                returns.
            job: a function to call when all copies are complete.
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
            # A new Python thread does not take over torch's number of threads.
            self._worker = ThreadPoolExecutor(
                1, "ema", initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
            )
        self._job = self._worker.submit(_after, event, job)

    def overlap(
        self, device: torch.device, flag: Tensor | None, job: Callable[[Tensor | None], None]
    ) -> None:
        """Run `job(flag)` on the side stream of `device`, after all work that is on the current stream now."""
        flag = None if flag is None else flag.clone()
        with self._beside(device):
            if flag is not None:
                flag.record_stream(self._stream)
            job(flag)
            self._mark(device)

    def wait(self) -> None:
        """Wait until shadows may be read and written: the host for the thread, the current stream for the side stream.

        Raises:
            Exception: An error of the job in the thread.
        """
        if self._process != os.getpid():
            # After a fork, the thread and its job exist in the parent process only.
            self._worker, self._job, self._process = None, None, os.getpid()
        job = self._job
        if job is not None:
            try:
                job.result()
            finally:
                # If a signal interrupted the wait, the job still runs, and the next call must wait for it.
                if job.done():
                    self._job = None
        self.release_live()

    def release_live(self) -> None:
        """Make the current stream wait until the live weights may be changed. The host does not wait."""
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
