"""Build a model on the meta device, then give every rank its part of the same initial weights."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.errors import blamed_on

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


class _Loading(TorchDispatchMode):
    """Context that records which meta tensors get values of real tensors: a constructor that loads weights does that.

    The copy into a meta tensor has no effect, so the values are lost.
    """

    def __init__(self) -> None:
        super().__init__()
        self._written: dict[int, bool] = {}
        self._alive: list[torch.UntypedStorage] = []  # an identity is used again once its storage is freed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].is_meta:
            target, values = args[:2]
            if not values.is_meta and values.ndim:  # a 0-dim tensor may be a number
                place = _storage(target)
                self._alive.append(target.untyped_storage())
                self._written[place] = self._written.get(place, False) or target.requires_grad
        return func(*args, **(kwargs or {}))

    def loaded(self, module: nn.Module) -> bool:
        """Return whether trainable parameters of the module got values, or are not on the meta device.

        Tables of positions, which a constructor may compute with numpy, are buffers or frozen parameters, and
        `init_weights` computes them again.
        """
        return any(
            not parameter.is_meta
            or self._written.get(place := _storage(parameter), False)
            or (place in self._written and parameter.requires_grad)
            for parameter in module.parameters()
        )


def _storage(tensor: torch.Tensor) -> int:
    """Return the identity of a tensor's storage, which its views share; a meta tensor has no address."""
    return tensor.untyped_storage()._cdata


def construct(make: Callable[[], nn.Module], *, on_meta: bool, seed: int) -> tuple[nn.Module, bool]:
    """Build a model, on the meta device unless its constructor loads weights; those must not be initialised over.

    Args:
        make: function that builds the model on the current default device.
        on_meta: whether the model can be built on the meta device.
        seed: seed of the initial weights.

    Returns:
        The model, and whether it is on the meta device.
    """
    torch.manual_seed(seed)
    if on_meta and (module := _on_meta(make)) is not None:
        return module, True
    torch.manual_seed(seed)
    return make(), False


def _on_meta(make: Callable[[], nn.Module]) -> nn.Module | None:
    """Return the model on the meta device, or None if its constructor loads weights."""
    try:
        with warnings.catch_warnings(), torch.device("meta"), _Loading() as loading:
            # The caller builds it again.
            warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
            module = make()
    except Exception as error:
        if "from_pretrained" in str(error):  # transformers refuses to load weights on the meta device
            return None
        raise
    return None if loading.loaded(module) else module


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
    with blamed_on("model"):  # the memory may be too small
        model.to_empty(device=device)
    torch.manual_seed(seed)
    with torch.no_grad(), SameRandomWeights():
        model.init_weights()
