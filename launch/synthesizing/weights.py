"""An average that is made from stored weights when it is swapped in, each rank its own part."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from ema.memory import local
from ema.swap import empty_weights, weights_swapped_into
from launch.synthesizing.basis import Kept
from trainer.checkpoint.store import load_checkpoint

MEMORY = 1 << 30
"""Bytes of stored weights, over all ranks, that stay in memory after they were read."""


class Stock:
    """Stored weights, whose files were verified by these ranks. The first ones that are read stay in memory.

    Many averages are made from the same weights, and most of the time of a small model is that of reading them. The
    weights get the devices and the sharding of `model`; `memory` is the most bytes in memory, over all ranks.
    """

    def __init__(self, model: nn.Module, memory: int = MEMORY) -> None:
        self._model, self._left = model, memory
        self._read: dict[tuple[str, str], dict[str, Tensor]] = {}

    def weights(self, one: Kept) -> dict[str, Tensor]:
        """Return stored weights by name, not to be changed.

        Collectives: those of `load_checkpoint`, unless they are in memory.
        """
        place = str(one.path), one.name
        if place in self._read:
            return self._read[place]
        weights = empty_weights(self._model, one.tensors)
        load_checkpoint(one.path, {one.keys[name]: weights[name] for name in weights}, verified=True)
        # The whole tensors count, so that all ranks keep the same.
        size = sum(tensor.nbytes for tensor in one.tensors.values())
        if size <= self._left:
            self._left -= size
            self._read[place] = weights
        return weights


class Synthesized:
    """Weighted sum of stored weights, all over the same tensors."""

    started = True
    parts: list[tuple[Kept, float]]
    """The stored weights that it needs, each with its coefficient."""

    def __init__(self, stock: Stock, kept: Sequence[Kept], coefficients: Sequence[float]) -> None:
        self._stock = stock
        self.parts = [(one, x) for one, x in zip(kept, coefficients, strict=True) if x]

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """Replace the live weights within the context; tensors that the averages do not track stay live.

        Collectives: those of `Stock.weights` for each stored weights.
        """
        with weights_swapped_into(model, self.weights(model)):
            yield

    @torch.no_grad()
    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the sum, in float32 or the widest dtype of its parts, sharded as the model.

        Memory: two copies of a rank's part.

        Collectives: those of `Stock.weights` for each stored weights.
        """
        wide = {
            name: torch.empty_like(tensor, dtype=_widest(name, [one for one, _ in self.parts]))
            for name, tensor in self.parts[0][0].tensors.items()
        }
        total = empty_weights(model, wide)
        for tensor in total.values():
            local(tensor).zero_()
        for one, shares in _terms(self.parts):
            part = self._stock.weights(one)
            for name, x in shares.items():
                tensor = total[name]
                local(tensor).add_(local(part[name]).to(tensor.dtype), alpha=x)
        return total


def _widest(name: str, kept: Sequence[Kept]) -> torch.dtype:
    """Return the dtype in which stored weights of a tensor are added up."""
    return reduce(torch.promote_types, (one.tensors[name].dtype for one in kept), torch.float32)


def _terms(parts: Sequence[tuple[Kept, float]]) -> list[tuple[Kept, dict[str, float]]]:
    """Return what is read for a sum of weights, each with its coefficients by name of the tensor.

    A tensor that is stored as a change from other weights needs those too, with the same coefficient.
    """
    found: dict[tuple[Path, str], tuple[Kept, dict[str, float]]] = {}
    for start, x in parts:
        one: Kept | None = start
        names = set(start.keys)
        while one is not None and names:
            _, shares = found.setdefault((one.path, one.name), (one, {}))
            for name in names:
                shares[name] = shares.get(name, 0.0) + x
            names &= one.changes
            one = one.before
    return list(found.values())
