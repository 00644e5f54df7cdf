"""Copy the tensors of a checkpoint to the host while the training goes on.

What a forward may change is copied before the next step begins. The rest, which only the optimizer step and the update
of the averages change, is copied beside the forward and the backward: on a GPU by a stream of its own, on the CPU by
the thread that writes the checkpoint afterwards.
"""

from collections.abc import Callable, Mapping
from threading import Event

import torch
from torch import Tensor

from ema.memory import local, wrapped_like


class Staging:
    """Copies of a state on the host; their memory is used again for the next state.

    The thread of the training calls `begin` and `wait`, another thread calls `finish`.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._late: list[tuple[str, Tensor, Tensor, int]] = []
        self._copied = Event()
        self._copied.set()
        self._stream: torch.cuda.Stream | None = None

    def begin(self, tensors: Mapping[str, Tensor], may_wait: Callable[[str], bool]) -> dict[str, Tensor]:
        """Start the copies and return them; they are filled when `finish` has returned.

        Args:
            tensors: tensors and DTensors by name. A DTensor becomes a DTensor with a local part on the host.
            may_wait: function that returns whether the tensor of a name stays unchanged until `wait` is called.
        """
        self._copied.clear()
        copies = {}
        on_device: list[tuple[str, Tensor, Tensor]] = []
        on_host: list[tuple[str, Tensor, Tensor]] = []
        for name, tensor in tensors.items():
            own = local(tensor).detach()
            copy = self._buffer(name, own)
            copies[name] = wrapped_like(tensor, copy)
            (on_device if own.is_cuda else on_host).append((name, own, copy))
        if on_device:
            self._copy_from_device(on_device, may_wait)
        self._late = [
            (name, tensor, copy, tensor._version) for name, tensor, copy in on_host if may_wait(name)
        ]
        for name, tensor, copy in on_host:
            if not may_wait(name):
                copy.copy_(tensor)
        return copies

    def finish(self) -> None:
        """Wait until all copies are filled; copy those that `begin` has left.

        Raises:
            RuntimeError: A tensor was changed before it was copied.
        """
        try:
            for _, tensor, copy, _ in self._late:
                copy.copy_(tensor)
            for name, tensor, _, version in self._late:
                if tensor._version != version:
                    raise RuntimeError(f"{name} was changed before the optimizer step, while it was copied")
        finally:
            self._late = []
            self._copied.set()
        if self._stream is not None:
            self._stream.synchronize()

    def wait(self) -> None:
        """Return when the tensors may be changed: at once for a GPU, whose stream waits for the copies."""
        self._copied.wait()
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        kept = self._buffers.get(name)
        if kept is None or kept.shape != like.shape or kept.dtype != like.dtype:
            kept = torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)
            self._buffers[name] = kept
        return kept

    def _copy_from_device(
        self, pairs: list[tuple[str, Tensor, Tensor]], may_wait: Callable[[str], bool]
    ) -> None:
        """Copy from the GPU on a stream of its own; the training's stream waits for what a forward may change."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        training = torch.cuda.current_stream()
        self._stream.wait_stream(training)
        with torch.cuda.stream(self._stream):
            for late in (False, True):
                for name, tensor, copy in pairs:
                    if may_wait(name) is late:
                        copy.copy_(tensor, non_blocking=True)
                        tensor.record_stream(self._stream)
                if not late:
                    training.wait_event(self._stream.record_event())
