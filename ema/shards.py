"""Moving whole values between tensors that may be sharded, each in its own way (DTensor) or not at all."""

import torch
from torch import Tensor

from ema.config import EMAConfig
from ema.names import is_dtensor, local


def gather(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank of its mesh (one all-gather per sharded mesh dimension), a plain one as it is."""
    if not is_dtensor(tensor):
        return tensor
    kind = tensor.device_mesh.device_type  # type: ignore[attr-defined]
    if tensor.device.type != kind:
        # Offloaded shards: the process group speaks the mesh's kind of device only.
        tensor = tensor.to(kind)
    return tensor.full_tensor()  # type: ignore[attr-defined]


def like(live: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor of `live`'s shape, device, strides, mesh and placements. No collective."""
    shard = torch.empty_like(local(live), dtype=dtype, requires_grad=False)
    if not is_dtensor(live):
        return shard
    return _shard_of(live, shard)


def _shard_of(model: Tensor, shard: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    # Without shape and stride, uneven shards would get a wrong global shape.
    return DTensor.from_local(
        shard,
        model.device_mesh,  # type: ignore[attr-defined]
        model.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=model.shape,
        stride=model.stride(),
    )


def new_shadow(name: str, live: Tensor, config: EMAConfig, *, averaged: bool) -> Tensor:
    """A tensor that keeps the average (or the copy) of `live`, holding its values now.

    Collectives: an all-gather of a sharded tensor in mode `full_tensor`.

    Raises:
        ValueError: if `live` has no values, or is sharded against `config.fsdp2`.
    """
    if live.is_meta:
        raise ValueError(
            f"{name!r}: expected a tensor with storage, got a meta tensor; materialise the model first"
        )
    if is_dtensor(live) and not config.fsdp2:
        raise ValueError(
            f"EMAConfig.fsdp2: expected True for a sharded model ({name!r} is a DTensor), got False"
        )
    live = live.detach()
    dtype = live.dtype
    if averaged and config.dtype is not None and live.is_floating_point():
        dtype = getattr(torch, config.dtype)
    if is_dtensor(live) and config.mode == "full_tensor":
        return gather(live).to(local(live).device, dtype, copy=True)
    shadow = like(live, dtype)
    assign(shadow, live)
    return shadow


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` with its storage on `device`."""
    part = local(tensor).to(device)
    return _shard_of(tensor, part) if is_dtensor(tensor) else part


def same_layout(one: Tensor, other: Tensor) -> bool:
    """Whether each rank holds the same elements of both."""
    if is_dtensor(one) != is_dtensor(other):
        return False
    if not is_dtensor(one):
        return True
    return one.device_mesh == other.device_mesh and one.placements == other.placements  # type: ignore[attr-defined]


def part_for(target: Tensor, source: Tensor) -> Tensor:
    """`source`'s elements that `target` holds on this rank, in source's dtype.

    Collectives: all-gathers of `source` if it is sharded in another way than `target`; otherwise none.
    """
    if same_layout(target, source):
        return local(source)
    whole = gather(source)
    if not is_dtensor(target):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh = target.device_mesh  # type: ignore[attr-defined]
    # src_data_rank=None: every rank has the whole tensor already, so each cuts its own part and nobody sends.
    split = distribute_tensor(whole.to(mesh.device_type), mesh, target.placements, src_data_rank=None)  # type: ignore[attr-defined]
    return local(split)


def assign(target: Tensor, source: Tensor) -> None:
    """Write `source` into `target` in place, elementwise and in target's dtype; collectives as `part_for`."""
    local(target).copy_(part_for(target, source))
