"""Random views of images for tasks that compare two of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.protocols import SampleRandom


def shifted(images: Tensor, random: SampleRandom) -> Tensor:
    """Return images, each shifted by up to one pixel in both directions; what comes in is the darkest value, -1.

    Args:
        images: float32 `[b, c, h, w]` in [-1, 1].
        random: source of random numbers; two numbers of each image are drawn.
    """
    height, width = images.shape[-2:]
    moves = (random.uniform(2) * 3).long().clamp(max=2)
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    rows = moves[:, :1] + torch.arange(height, device=images.device)
    columns = moves[:, 1:] + torch.arange(width, device=images.device)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def noisy_view(images: Tensor, noise: float, random: SampleRandom) -> Tensor:
    """Return images, each shifted and with normal noise of a standard deviation."""
    return shifted(images, random) + noise * random.normal(*images.shape[1:])
