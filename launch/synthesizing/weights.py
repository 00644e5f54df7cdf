"""An average that is made from stored weights when it is swapped in, each rank its own part."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ema.memory import local
from ema.swap import empty_weights, weights_swapped_into
from launch.synthesizing.basis import Kept
from trainer.checkpoint.store import load_checkpoint
from trainer.rundir.keys import LIVE


class Synthesized:
    """Weighted sum of stored weights, whose files were verified by these ranks.

    Args:
        kept: stored weights, all over the same tensors.
        coefficients: coefficient of each.
    """

    started = True
    parts: list[tuple[Kept, float]]
    """The stored weights that it needs, each with its coefficient."""

    def __init__(self, kept: Sequence[Kept], coefficients: Sequence[float]) -> None:
        self.parts = [(one, x) for one, x in zip(kept, coefficients, strict=True) if x]

    @property
    def is_live(self) -> bool:
        """Whether it is the live weights of one step."""
        return [one.name for one, _ in self.parts] == [LIVE]

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """Replace the live weights within the context; tensors that the averages do not track stay live.

        Collectives: those of `load_checkpoint` for each stored weights.
        """
        with weights_swapped_into(model, self.weights(model)):
            yield

    @torch.no_grad()
    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the sum, in float32 or wider, sharded as the model; memory: two copies of a rank's part.

        Collectives: those of `load_checkpoint` for each stored weights.
        """
        first = self.parts[0][0].tensors
        wide = {
            name: torch.empty_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
            for name, tensor in first.items()
        }
        total = empty_weights(model, wide)
        for tensor in total.values():
            local(tensor).zero_()
        for one, x in self.parts:
            part = empty_weights(model, one.tensors)
            load_checkpoint(one.path, {one.keys[name]: part[name] for name in part}, verified=True)
            for name, tensor in total.items():
                local(tensor).add_(local(part[name]).to(tensor.dtype), alpha=x)
        return total
