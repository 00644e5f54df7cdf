"""Decode an image file to 8-bit RGB, upright, and make a sample of it."""

from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST_SIZE = 10_000
"""Largest height and width in pixels of a sample."""

_TIFF_BITS, _TIFF_PHOTOMETRIC, _BLACK_IS_ZERO = 258, 262, 1


def read_rgb(source: str | IO[bytes]) -> "Image":
    """Decode the first frame of a file to RGB, turned by its EXIF orientation.

    Transparency is dropped, as torchvision and timm drop it: a pixel has the colour that is stored for it. Colour
    profiles are not applied. 16 bits are scaled to 8.

    Args:
        source: path of an image file, or the open file; Pillow refuses one of more than 178,956,970 pixels before it
            takes memory for them.

    Raises:
        Exception: any of Pillow's errors for a damaged file, or a ValueError for pixels of an undefined range.
    """
    from PIL import Image, ImageOps  # only pictures need it

    with Image.open(source) as file:
        file.load()
        if _has_readable_exif(file):
            ImageOps.exif_transpose(file, in_place=True)
        if file.mode.startswith("I") or file.mode == "F":
            return Image.fromarray(_eight_bits(file)).convert("RGB")
        file.info.pop("transparency", None)  # Pillow would warn that it is dropped
        return file.convert("RGB")


def check_image_size(image_size: int) -> None:
    """Refuse a size of the samples outside 1 to `LARGEST_SIZE`.

    Raises:
        ConfigError: The size is out of range; the message begins with `data.image_size`.
    """
    if not 1 <= image_size <= LARGEST_SIZE:
        raise ConfigError(f"data.image_size: {image_size} is not between 1 and {LARGEST_SIZE}")


def square_of(image: "Image", image_size: int) -> Tensor:
    """Return the largest centred square of an RGB image, resized, float32 `[3, size, size]` in [-1, 1]."""
    from PIL.Image import Resampling

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Cropped before resizing, because a resize of a box also uses pixels outside of the box.
    image = image.crop((left, top, left + side, top + side))
    image = image.resize((image_size, image_size), Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _has_readable_exif(image: "Image") -> bool:
    """Return whether the EXIF block can be parsed; viewers show a picture with a damaged one as it is stored."""
    try:
        image.getexif()
    except Exception:  # any of the parser's errors: SyntaxError, struct.error, ValueError, ...
        return False
    return True


def _eight_bits(image: "Image") -> np.ndarray:
    """Scale the pixels of a grey image with more than 8 bits, uint8 `[height, width]`."""
    has_16_bits = image.mode.startswith("I;16")
    if (
        image.format == "TIFF"
    ):  # Pillow reads 12 bits, or white as 0, into the same mode and does not scale them
        tags = image.tag_v2  # type: ignore[attr-defined]
        has_16_bits &= tags.get(_TIFF_BITS) == (16,) and tags.get(_TIFF_PHOTOMETRIC) == _BLACK_IS_ZERO
    elif image.mode == "I":
        has_16_bits = image.format in ("PNG", "PPM")
    if not has_16_bits:
        raise ValueError(
            f"the range of its pixels is unknown (mode {image.mode}), expected 8 or 16 bits, 0 is black"
        )
    return ((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)
