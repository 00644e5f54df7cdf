"""Change training pictures by the user's transforms, each sample with random numbers of its own seed.

A transform is any callable of one picture, uint8 `[3, height, width]`, that returns such a picture of any height and
width. The classes of `torchvision.transforms.v2` are of this kind.
"""

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from trainer.errors import ConfigError, blamed_on
from trainer.protocols import Batch, Dataset
from trainer.seeding import mix

if TYPE_CHECKING:
    from PIL.Image import Image

Change = Callable[[int, "Image", str], "Image"]
"""Function of the position of a sample in its batch, a picture and its place for messages."""


class Pictures(Dataset, Protocol):
    """Data set of pictures that can be changed after they are decoded, before the square is cropped."""

    def batch(self, indices: Sequence[int], change: Change | None = None) -> Batch:
        """Return the batch of `__getitems__` with changed pictures; `change` gets the position in `indices`."""


class AugmentedPictures:
    """Data set of pictures that a chain of transforms changes; its random numbers are a function of a sample's seed.

    A transform whose call has an argument `generator` gets a `torch.Generator`. The others draw from the global
    generators of torch, random and numpy, which have their state back afterwards. `numpy.random.default_rng()` without
    a seed cannot be controlled. All pictures of a sample are changed with the same random numbers.

    Args:
        pictures: data set.
        transforms: transforms in the order of their calls; they must keep no state between two calls.

    Raises:
        ConfigError: An entry cannot be called.
    """

    def __init__(self, pictures: Pictures, transforms: Sequence[Callable[..., Any]]) -> None:
        self._pictures = pictures
        self._transforms: list[tuple[str, Callable[..., Any], bool]] = []
        for number, transform in enumerate(transforms):
            key = f"data.transforms[{number}]"
            if not callable(transform):
                raise ConfigError(f"{key}: expected a _target_ that builds a callable, got {transform!r}")
            name = f"{key} ({type(transform).__name__})"
            self._transforms.append((name, transform, _takes_generator(transform)))

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self._pictures.__getitems__(indices)

    def augmented(self, indices: Sequence[int], seeds: Sequence[int]) -> Batch:
        """Return the batch of `__getitems__` with changed pictures; the seed of a sample gives its random numbers.

        Raises:
            ConfigError: A picture cannot be decoded, or a transform does not return one; names it and the picture.
        """
        return self._pictures.batch(
            indices, lambda number, image, origin: self._changed(image, seeds[number], origin)
        )

    def _changed(self, image: "Image", seed: int, origin: str) -> "Image":
        from PIL.Image import fromarray  # only pictures need it

        picture = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        with _seeded(seed):
            for number, (name, transform, takes_generator) in enumerate(self._transforms):
                arguments = {}
                if takes_generator:
                    arguments["generator"] = torch.Generator().manual_seed(mix(seed, number))
                with blamed_on(f"{name} fails on {origin}"):
                    picture = transform(picture, **arguments)
                if not _is_picture(picture):
                    raise ConfigError(
                        f"{name} on {origin}: expected uint8 [3, height, width], got {_shown(picture)}"
                    )
        return fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def augmented_by(transforms: Sequence[Callable[..., Any]] | None, pictures: Pictures) -> Dataset:
    """Return the pictures with the changes of `data.transforms`; without transforms as they are.

    Raises:
        ConfigError: A transform cannot be called, or fails on the first picture.
    """
    if not transforms:
        return pictures
    augmented = AugmentedPictures(pictures, transforms)
    augmented.augmented([0], [0])  # a transform that fails is refused before the run has a directory
    return augmented


def _takes_generator(transform: Callable[..., Any]) -> bool:
    call = transform.forward if isinstance(transform, torch.nn.Module) else transform
    try:
        return "generator" in inspect.signature(call).parameters
    except ValueError:  # a function in C, whose arguments Python cannot list
        return False


def _is_picture(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.ndim != 3:
        return False
    return value.shape[0] == 3 and value.numel() > 0


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of torch (CPU), random and numpy; afterwards they continue as before."""
    of_torch, of_random, of_numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        # torch.manual_seed would also seed the devices.
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
        yield
    finally:
        torch.set_rng_state(of_torch)
        random.setstate(of_random)
        np.random.set_state(of_numpy)
