"""Build a model on the meta device, then give every rank its part of the same initial weights."""

import inspect
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

_RANDOM_FILLS = (
    torch.ops.aten.normal_.default,
    torch.ops.aten.uniform_.default,
)


@runtime_checkable
class Materializes(Protocol):
    """A model that can be built on the meta device, because `init_weights` sets every parameter and buffer."""

    def init_weights(self) -> None: ...

    def shard_blocks(self) -> list[nn.Module]: ...


def builds_on_meta(target: Any) -> bool:
    """Return whether `target` is a class that can be built on the meta device.

    False for every function, because it may compute with the values of the model.
    """
    return inspect.isclass(target) and issubclass(target, Materializes)


class SameRandomWeights(TorchDispatchMode):
    """Context in which `normal_` and `uniform_` of a DTensor draw the full tensor and keep only this rank's shard.

    Without it, the random numbers of a DTensor depend on the mesh, and on the CPU every rank draws the same ones. With
    it, the full tensor comes from the default generator, one parameter at a time. So every sharding gets the weights of
    the run in one process, bit for bit.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _RANDOM_FILLS or not isinstance(args[0], DTensor):
            return func(*args, **kwargs)
        target = args[0]
        full = torch.empty(target.shape, dtype=target.dtype, device=target.to_local().device)
        func(full, *args[1:], **kwargs)
        # Every rank has drawn the same numbers, so no rank has to send its own.
        shard = distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(shard.to_local())
        return target


def materialize(model: nn.Module, device: torch.device, seed: int) -> None:
    """Allocate a model that was built on the meta device and set its initial weights, the same for every sharding."""
    if not isinstance(model, Materializes):
        raise TypeError(
            f"{type(model).__name__} has no init_weights() and cannot be built on the meta device"
        )
    model.to_empty(device=device)
    torch.manual_seed(seed)
    with torch.no_grad(), SameRandomWeights():
        model.init_weights()
