"""What the constructors share: refusing impossible sizes, and initialising once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch


class Initialisable(Protocol):
    """A module that knows its own initial values."""

    def to_empty(self, *, device: torch.device) -> object:
        """Allocate all parameters and buffers on `device`, as `torch.nn.Module` does."""

    def init_weights(self) -> None:
        """Set every parameter and buffer."""


def require_positive(model: str, **sizes: float) -> None:
    """Refuse sizes that are zero, negative, infinite or not a number.

    Raises:
        ValueError: naming the model, the first bad argument and its value.
    """
    for name, size in sizes.items():
        if not 0 < size < float("inf"):
            raise ValueError(f"{model}: {name} must be above 0 and finite, got {size}")


def hidden_width(model: str, width: int, mlp_ratio: float) -> int:
    """Width of a block's MLP, `mlp_ratio` times the block's, rounded down.

    Raises:
        ValueError: if not even one unit is left.
    """
    require_positive(model, mlp_ratio=mlp_ratio)
    if width * mlp_ratio < 1:
        raise ValueError(f"{model}: mlp_ratio {mlp_ratio} leaves no hidden unit at width {width}")
    return int(width * mlp_ratio)


@contextmanager
def initialised_once(model: Initialisable) -> Iterator[None]:
    """Make the layers within on meta, then give them memory on the caller's device and call `init_weights`.

    The layers' own initialisation would be overwritten, but not before it had drawn random numbers. Without
    it, a model built directly equals one built on meta and initialised later from the same seed. For a caller
    on meta the model stays there.
    """
    device = torch.get_default_device()
    with torch.device("meta"):
        yield
    if device.type != "meta":
        model.to_empty(device=device)
        model.init_weights()
