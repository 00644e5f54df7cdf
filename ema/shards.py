"""Copy values between tensors that may be sharded (DTensor) in different ways."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ema.config import EMAConfig
from ema.memory import PLAIN_TENSORS, is_dtensor, is_plain, like, local, wrapped_like


def gather(tensor: Tensor) -> Tensor:
    """Return the whole tensor on every rank of its mesh; a plain tensor is returned as it is.

    Collectives: one all-gather per sharded dimension of the mesh.
    """
    if not is_dtensor(tensor):
        return tensor
    kind = tensor.device_mesh.device_type  # type: ignore[attr-defined]
    if tensor.device.type != kind:
        # The shards are offloaded, and the process group can only send tensors on the mesh's kind of device.
        tensor = tensor.to(kind)
    return tensor.full_tensor()  # type: ignore[attr-defined]


def new_shadow(name: str, live: Tensor, config: EMAConfig, *, averaged: bool) -> Tensor:
    """Make the shadow of `live` with its present values.

    Args:
        name: of the tensor, for messages.
        live: the live tensor.
        config: settings of the average.
        averaged: whether the shadow is an average, in `config.dtype`, or a copy in the dtype of `live`.

    Collectives: in mode `full_tensor` an all-gather if `live` is sharded.

    Raises:
        ValueError: The config does not allow the sharding of `live`.
    """
    if is_dtensor(live) and not config.fsdp2:
        raise ValueError(
            f"EMAConfig.fsdp2: expected True for a sharded model ({name!r} is a DTensor), got False"
        )
    if is_dtensor(live) and config.mode == "full_tensor" and (config.device is not None or config.overlap):
        raise ValueError(
            "EMAConfig.mode: expected local_shard for a sharded model whose average is updated in the background"
            f" (device={config.device!r}, overlap={config.overlap}), got 'full_tensor'"
        )
    live = live.detach()
    dtype = live.dtype
    if averaged and config.dtype is not None and live.is_floating_point():
        dtype = getattr(torch, config.dtype)
    if is_dtensor(live) and config.mode == "full_tensor":
        return gather(live).to(home(live, config), dtype, copy=True)
    shadow = like(live, dtype, home(live, config))
    assign(shadow, live)
    return shadow


def home(live: Tensor, config: EMAConfig) -> torch.device:
    """Return the device of the shadow of `live`."""
    return local(live).device if config.device is None else torch.device(config.device)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` with its storage on `device`."""
    return wrapped_like(tensor, local(tensor).to(device))


def same_layout(one: Tensor, other: Tensor) -> bool:
    """Return whether each rank has the same elements of both tensors."""
    if is_dtensor(one) != is_dtensor(other):
        return False
    if not is_dtensor(one):
        return True
    return one.device_mesh == other.device_mesh and one.placements == other.placements  # type: ignore[attr-defined]


def part_for(target: Tensor, source: Tensor) -> Tensor:
    """Return the elements of `source` that belong to this rank's part of `target`, in source's dtype.

    Collectives: all-gathers of `source` if it is sharded in another way than `target`; otherwise none.
    """
    if type(target) in PLAIN_TENSORS and type(source) in PLAIN_TENSORS:
        return source
    if same_layout(target, source):
        return local(source)
    whole = gather(source)
    if not is_dtensor(target):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh = target.device_mesh  # type: ignore[attr-defined]
    # With src_data_rank=None each rank cuts its part out of its own whole tensor, without communication.
    split = distribute_tensor(whole.to(mesh.device_type), mesh, target.placements, src_data_rank=None)  # type: ignore[attr-defined]
    return local(split)


def assign(target: Tensor, source: Tensor) -> None:
    """Copy `source` into `target` in place, in target's dtype; collectives as `part_for`."""
    copy_all([(target, source)])


def copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair into the first one in place; collectives as `part_for`."""
    # A device copies tensors of one dtype in one call.
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in pairs:
        part, values = local(target), part_for(target, source)
        # A part that was made for this copy is freed before the next one is made.
        if values is local(source) and is_plain(part) and not part.is_inference():
            kind = None if part.is_cpu else (part.device, part.dtype)
            group = groups.get(kind) or groups.setdefault(kind, ([], []))
            group[0].append(part)
            group[1].append(values)
        else:
            with torch.inference_mode(part.is_inference()), torch.no_grad():
                part.copy_(values)
    with torch.inference_mode(False), torch.no_grad():
        for targets, sources in groups.values():
            torch._foreach_copy_(targets, sources)
