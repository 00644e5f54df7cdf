"""Refuse tensors that have no average, when it is made: a later error would have no name, or there would be none."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ema.config import EMAConfig
from ema.memory import consists_of_others, local, overlaps_itself


def refuse_kind(name: str, live: Tensor, config: EMAConfig, *, averaged: bool) -> None:
    """Raise a ValueError if `live` cannot be averaged or copied, also for its dtype; arguments as for `refuse_form`."""
    refuse_form(name, live, config, averaged=averaged)
    if not averaged:
        return
    wide = live.dtype
    if config.dtype is not None and live.is_floating_point():
        wide = getattr(torch, config.dtype)
    if not _has_lerp(live.dtype, wide):
        remedy = (
            "exclude it, or keep it in complex64" if live.is_complex() else "set EMAConfig.dtype to float32"
        )
        raise ValueError(f"{name!r} has dtype {live.dtype}, which cannot be averaged in {wide}: {remedy}")


def refuse_form(name: str, live: Tensor, config: EMAConfig, *, averaged: bool) -> None:
    """Raise a ValueError with name and remedy if the elements of `live` cannot be averaged or copied.

    Args:
        name: of the tensor.
        live: the live tensor.
        config: settings of the average.
        averaged: whether the tensor is averaged, not copied.
    """
    if is_lazy(live):
        raise ValueError(
            f"{name!r} is a lazy tensor without a shape: run one forward before making the average"
        )
    if live.is_meta:
        raise ValueError(
            f"{name!r}: expected a tensor with storage, got a meta tensor; materialise the model first"
        )
    part = local(live)
    if part.is_nested:
        raise ValueError(f"{name!r} is a nested tensor: exclude it, or keep a padded tensor instead")
    if consists_of_others(live) and (averaged or isinstance(live, nn.Parameter)):
        raise ValueError(
            f"{name!r} is a {type(part).__name__}, which consists of other tensors and cannot be put back after a swap:"
            " exclude it, or make the average of the plain weights"
        )
    only_dense = averaged or config.device is not None or part.layout is torch._mkldnn  # type: ignore[attr-defined]
    if only_dense and part.layout is not torch.strided:
        raise ValueError(f"{name!r} has layout {part.layout}: exclude it, or make it dense with to_dense()")
    if averaged and overlaps_itself(part):
        raise ValueError(f"{name!r} is an expanded tensor whose elements share memory: make it contiguous()")


def kind_of(tensor: Tensor) -> tuple[bool, bool]:
    """Return whether a tensor is floating-point and whether it is complex; integers are neither."""
    return tensor.is_floating_point(), tensor.is_complex()


@cache
def _has_lerp(live: torch.dtype, shadow: torch.dtype) -> bool:
    """Return whether torch can cast one dtype to the other and average in it."""
    with torch.inference_mode(False), torch.no_grad():
        try:
            value = torch.empty(2, dtype=live, device="cpu").to(shadow)
            torch._foreach_lerp_([value], [value.clone()], 0.5)
        except (RuntimeError, NotImplementedError, TypeError):
            return False
    return True
