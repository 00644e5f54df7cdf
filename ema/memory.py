"""The memory of tensors: the local part of sharded ones, and which tensors share elements."""

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Place = tuple[Any, ...]
PLAIN_TENSORS = frozenset({Tensor, nn.Parameter})
"""Classes of tensors that have memory of their own; a buffer is a Tensor."""


def is_dtensor(tensor: Any) -> bool:
    """Return whether `tensor` is a DTensor. Does not import torch.distributed.tensor, which takes 1.5 s."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, which shares its memory; a plain tensor is returned as it is."""
    if type(tensor) in PLAIN_TENSORS:
        return tensor
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


@contextmanager
def own_caches() -> Iterator[None]:
    """Keep apart what torch has computed from parameters and keeps: casts of autocast, `parametrize.cached()`.

    Its caches know a parameter by its name or object, not by the values that it has now.
    """
    torch.clear_autocast_cache()
    before = parametrize._cache
    own: dict[Any, Any] = {}
    parametrize._cache = own
    try:
        yield
    finally:
        # Another dictionary is there if contexts did not end in their order; then the weights are computed again.
        parametrize._cache = before if parametrize._cache is own and parametrize._cache_enabled else {}
        torch.clear_autocast_cache()


def is_part(tensor: Tensor) -> bool:
    """Return whether the tensor's memory on this rank is a part of a larger one."""
    own = local(tensor)
    return own.layout is torch.strided and own.untyped_storage().nbytes() > own.nbytes


def locals_of(tensors: list[Tensor]) -> list[Tensor]:
    """Return `local` of each tensor, faster than one by one; the list itself if no DTensors can exist."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return tensors
    sharded = module.DTensor
    return [tensor._local_tensor if isinstance(tensor, sharded) else tensor for tensor in tensors]


def like(live: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make an uninitialised tensor with `live`'s shape, strides, mesh and placements. No collective."""
    return wrapped_like(live, torch.empty_like(local(live), dtype=dtype, device=device, requires_grad=False))


def wrapped_like(model: Tensor, part: Tensor) -> Tensor:
    """Return `part` as a DTensor with `model`'s global shape, mesh and placements, or as it is if `model` is plain."""
    if not is_dtensor(model):
        return part
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import TensorMeta

    # `DTensor.from_local` would move a part on the CPU to the mesh's device, and it would compute a wrong global shape
    # for uneven shards unless it is given shape and stride.
    spec = copy.copy(model._spec)  # type: ignore[attr-defined]
    spec.tensor_meta = TensorMeta(model.shape, model.stride(), part.dtype)
    return DTensor(part, spec, requires_grad=False)


def place(tensor: Tensor) -> Place | None:
    """Return what two tensors have in common if and only if they are views of the same elements in the same order.

    None for a tensor without elements or without memory of its own.
    """
    part = _strided(tensor)
    if part is None:
        return None
    if part.is_contiguous():  # the shape implies the strides
        return part.device, part.data_ptr(), part.dtype, part.shape
    strides = tuple(stride for stride, size in zip(part.stride(), part.shape, strict=True) if size > 1)
    return part.device, part.data_ptr(), part.dtype, part.shape, strides


def storage_of(tensor: Tensor) -> int | None:
    """Return a number that all tensors of one storage have in common; None as for `place`."""
    part = _strided(tensor)
    return None if part is None else part.untyped_storage()._cdata


def consists_of_others(tensor: Tensor) -> bool:
    """Return whether this rank's part is of a class that holds its values in other tensors, as torchao's weights do."""
    return bool(is_traceable_wrapper_subclass(local(tensor)))


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is strided, has elements, and has memory of its own."""
    return (
        type(tensor) in PLAIN_TENSORS
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and tensor.data_ptr() != 0
    )


def _strided(tensor: Tensor) -> Tensor | None:
    if is_plain(tensor):
        return tensor
    if is_lazy(tensor):
        return None
    part = local(tensor)
    if part.is_nested or part.layout is not torch.strided or part.is_meta or not part.numel():
        return None
    try:
        return part if part.data_ptr() else None
    except (RuntimeError, NotImplementedError):  # a tensor subclass that wraps others
        return None


def extent(tensor: Tensor) -> int:
    """Return the number of elements from the first to the last one in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def overlaps_itself(tensor: Tensor) -> bool:
    """Return whether several elements of a strided tensor are one in memory, as after `expand`."""
    if tensor.is_contiguous():
        return False
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < filled:
                return len(_positions(tensor).unique()) < tensor.numel()
            filled += (size - 1) * stride
    return False


def writable(tensor: Tensor) -> Tensor:
    """Return a detached tensor of the same memory that can be written in place; flat if it would overlap itself.

    Args:
        tensor: a detached tensor.
    """
    if _strided(tensor) is None or not overlaps_itself(tensor):
        return tensor
    return tensor.detach().as_strided((extent(tensor),), (1,))


def overlapping(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Iterate over the pairs of names whose tensors share elements."""
    by_storage: dict[int | None, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        by_storage.setdefault(storage_of(tensor), []).append((name, local(tensor)))
    by_storage.pop(None, None)
    for sharing in by_storage.values():
        if len(sharing) == 1:
            continue
        members = []
        for name, part in sharing:
            begin = part.data_ptr()
            members.append((begin, begin + extent(part) * part.element_size(), name, part))
        members.sort(key=lambda member: member[:2])
        for position, (_, end, name, part) in enumerate(members):
            for begin, _, other, its_part in members[position + 1 :]:
                if begin >= end:
                    break
                if _share_elements(part, its_part):
                    yield name, other


def _share_elements(one: Tensor, other: Tensor) -> bool:
    size = one.element_size()
    between = other.data_ptr() - one.data_ptr()
    if size != other.element_size() or between % size:
        return True
    return bool(torch.isin(_positions(one), _positions(other) + between // size).any())


def _positions(tensor: Tensor) -> Tensor:
    """Return the positions in memory of all elements, counted from the first one."""
    line = torch.arange(extent(tensor), device="cpu")
    return line.as_strided(tensor.shape, tensor.stride(), 0).reshape(-1)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bits. Waits for the device."""
    if one.dtype != other.dtype or one.shape != other.shape or one.device != other.device:
        return False
    if one.is_quantized or other.is_quantized:
        return torch.equal(one, other)
    if one.layout is not torch.strided or other.layout is not torch.strided:
        return bool(one.layout == other.layout and torch.equal(one.to_dense(), other.to_dense()))
    return torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def first_conflict(writes: Iterable[tuple[str, Tensor, Tensor]]) -> tuple[str, str] | None:
    """Return two names whose tensors share elements and would be given different values; None if there are none.

    Args:
        writes: name, tensor, and the new values of this rank's part of it.
    """
    given = {name: (local(tensor), value) for name, tensor, value in writes}
    for first, second in overlapping({name: tensor for name, (tensor, _) in given.items()}):
        (one, ones), (other, others) = given[first], given[second]
        if one.dtype != other.dtype:
            return first, second
        between = (other.data_ptr() - one.data_ptr()) // one.element_size()
        scratch = torch.empty(max(extent(one), between + extent(other)), dtype=one.dtype, device=one.device)
        left = scratch.as_strided(one.shape, one.stride(), 0)
        right = scratch.as_strided(other.shape, other.stride(), between)
        if overlaps_itself(left) or overlaps_itself(right):
            return first, second
        left.copy_(ones)
        right.copy_(others)
        if not same_bits(left, ones.to(one.device, one.dtype)):
            return first, second
    return None
