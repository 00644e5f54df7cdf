"""Functions for the constructors of all networks: check the sizes, and set the initial weights once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def require_positive(model: str, **sizes: float) -> None:
    """Refuse sizes that are zero, negative, infinite or NaN.

    Args:
        model: name of the model, for error messages.
        **sizes: sizes by name of the argument.

    Raises:
        ValueError: A size is not above 0 and finite; the message has the model, the first such argument and its value.
    """
    for name, size in sizes.items():
        if not 0 < size < float("inf"):
            raise ValueError(f"{model}: {name} must be above 0 and finite, got {size}")


def hidden_width(model: str, width: int, mlp_ratio: float) -> int:
    """Return the hidden width of a block's MLP: `mlp_ratio` times `width`, rounded down.

    Args:
        model: name of the model, for error messages.
        width: width of the block, at least 1.
        mlp_ratio: hidden width of the MLP divided by `width`, above 0.

    Raises:
        ValueError: The hidden width would be 0, or `mlp_ratio` is not above 0 and finite.
    """
    require_positive(model, mlp_ratio=mlp_ratio)
    if width * mlp_ratio < 1:
        raise ValueError(f"{model}: mlp_ratio {mlp_ratio} leaves no hidden unit at width {width}")
    return int(width * mlp_ratio)


@contextmanager
def initialised_once(model: Any) -> Iterator[None]:
    """Build the layers inside on the meta device, then allocate them on the default device and call `init_weights`.

    Layers on the meta device do not draw random numbers for their own initial weights. So for one seed, a model that is
    built directly has the same weights as a model that is built on the meta device and initialised later. If the
    default device is the meta device, the model stays there without weights.

    Args:
        model: `torch.nn.Module` with a method `init_weights()` that sets every parameter and buffer.
    """
    device = torch.get_default_device()
    with torch.device("meta"):
        yield
    if device.type != "meta":
        model.to_empty(device=device)
        model.init_weights()
