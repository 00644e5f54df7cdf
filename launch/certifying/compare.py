"""Differences between the tensors of two checkpoints, tensor by tensor, so that two tensors are in memory at a time."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint.store import TensorReader, stored_tensors
from trainer.rundir.keys import AVERAGE
from trainer.weights.run_directory import MODEL


@dataclass
class Worst:
    """Largest difference so far, and where it is; NaN counts as infinite."""

    difference: float = 0.0
    where: str = ""

    def add(self, difference: float, where: str) -> None:
        """Take a further difference into account."""
        difference = math.inf if math.isnan(difference) else difference
        if difference > self.difference:
            self.difference, self.where = difference, where

    def in_words(self, compared: str) -> str:
        """Return what was compared, and the place of the difference if there is one."""
        return f"{compared}; largest in {self.where}" if self.where else compared


def identical(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same bits, so that equal NaNs count as identical."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*bits)


def bitwise(one: Path, other: Path) -> tuple[Worst, int]:
    """Compare all tensors of two checkpoints.

    Returns:
        The largest absolute difference of two values that do not have the same bits, infinite if a tensor is missing,
        and the number of tensors.
    """
    readers = TensorReader(one), TensorReader(other)
    names, others = stored_tensors(one), stored_tensors(other)
    worst = Worst()
    for name in sorted(names.keys() | others.keys()):
        if name not in names or name not in others or names[name].shape != others[name].shape:
            worst.add(math.inf, name)
            continue
        first, second = (reader.read(name) for reader in readers)
        if not identical(first, second):
            gap = float((first.double() - second.double()).abs().max())
            worst.add(gap or math.ulp(0.0), name)  # 0 and -0 differ too
    return worst, len(names)


def relative(one: Path, other: Path, change: float, names: Collection[str], steps: int) -> tuple[Worst, int]:
    """Compare the parameters of these names, and their averages, in checkpoints of two runs of `steps` steps.

    The differences are relative to `change`, the largest change of a parameter in the run. What the rounding of each
    step's result explains is no difference: `steps` times the spacing of the stored numbers.
    """
    first, second = TensorReader(one), TensorReader(other)
    keys, others = _parameter_keys(stored_tensors(one), names), stored_tensors(other)
    worst = Worst()
    for key in keys:
        if key not in others:
            worst.add(math.inf, key)
            continue
        left, right = first.read(key), second.read(key)
        if not left.is_floating_point() or left.numel() == 0:
            continue
        rounding = steps * torch.finfo(left.dtype).eps * left.double().abs()
        gap = (left.double() - right.double()).abs() - rounding
        worst.add(max(0.0, float(gap.max())) / change, key)
    return worst, len(keys)


def largest_change(earlier: Path, later: Path, names: Iterable[str]) -> float:
    """Return the largest absolute change of a parameter between two checkpoints of a run."""
    first, second, stored = TensorReader(earlier), TensorReader(later), stored_tensors(later)
    wanted = {f"{MODEL}{name}" for name in names}
    changes = (
        float((second.read(key).double() - first.read(key).double()).abs().max())
        for key, like in stored.items()
        if key in wanted and like.numel()
    )
    return max(changes, default=0.0)


def _parameter_keys(stored: Iterable[str], names: Collection[str]) -> list[str]:
    """Return the keys of the parameters with these names in a checkpoint, and those of their averages."""
    return [
        key
        for key in stored
        if (key.startswith(MODEL) and key.removeprefix(MODEL) in names)
        or (key.startswith(AVERAGE) and key.removeprefix(AVERAGE).partition("/")[2] in names)
    ]
