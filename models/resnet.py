"""A residual network with BatchNorm for small images (He et al., arXiv:1512.03385, section 4.2)."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.construction import initialised_once, require_positive


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Make a 3 x 3 convolution that keeps the image size, or halves it (rounded up) at stride 2."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm that casts its scale and shift to the dtype of its statistics.

    In bfloat16, FSDP2 casts the parameters before a forward but not the buffers, and torch refuses to mix the two
    dtypes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise images `[b, channels, h, w]`; return the same shape."""
        mean, variance = self.running_mean, self.running_var
        assert mean is not None and self.num_batches_tracked is not None
        if self.training:
            self.num_batches_tracked.add_(1)
        # Without a momentum the statistics are the mean over all batches so far, as in torch's own layer.
        momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        scale, shift = self.weight.to(mean.dtype), self.bias.to(mean.dtype)
        return F.batch_norm(x, mean, variance, scale, shift, self.training, momentum, self.eps)


class Block(nn.Module):
    """Residual block of two convolutions; a 1 x 1 convolution projects the input if channels or size change."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.norm1 = BatchNorm(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.norm2 = BatchNorm(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, BatchNorm(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to images `[b, in_channels, h, w]`; return `[b, out_channels, h / stride, w / stride]`."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network that returns the class logits of small images.

    The first stage keeps the size of the image, and each later stage halves it. In training, each process computes its
    BatchNorm statistics from its own images, so they differ between processes.

    Args:
        in_channels: number of channels of the images, at least 1.
        num_classes: number of classes, at least 1.
        widths: number of channels of each stage, at least 1 each.
        blocks_per_stage: number of residual blocks in each stage, at least 1.
        image_size: height and width in pixels for which FLOPs are counted, at least 1; `forward` accepts any size.

    Raises:
        ValueError: An argument is out of its range; the message has its name.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        widths: list[int],
        blocks_per_stage: int,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        require_positive("ResNet", in_channels=in_channels, num_classes=num_classes, image_size=image_size)
        require_positive("ResNet", blocks_per_stage=blocks_per_stage)
        if not widths or min(widths) < 1:
            raise ValueError(f"ResNet: widths must be one or more numbers of channels, got {widths}")
        self.image_size = image_size
        with initialised_once(self):
            self.stem = nn.Sequential(conv3x3(in_channels, widths[0]), BatchNorm(widths[0]), nn.ReLU())
            self.blocks = nn.ModuleList()
            channels = widths[0]
            for stage, width in enumerate(widths):
                for index in range(blocks_per_stage):
                    self.blocks.append(Block(channels, width, stride=2 if stage and not index else 1))
                    channels = width
            self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `[b, num_classes]` of images `[b, in_channels, h, w]`."""
        x = self.stem(images.to(self.head.weight.dtype))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))

    def init_weights(self) -> None:
        """Set every parameter and buffer, sharded or not.

        Convolutions get He's normal distribution (arXiv:1502.01852, eq. 10), the head a normal distribution with
        standard deviation 0.01. The scale of the last norm in each block is zero, so that initially the two
        convolutions add nothing to the shortcut (arXiv:1706.02677, section 5.1).
        """
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for name, parameter in self.named_parameters():
            if name.endswith("norm2.weight"):
                nn.init.zeros_(parameter)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def shard_blocks(self) -> list[nn.Module]:
        """Return the residual blocks in their order."""
        return list(self.blocks)

    def flops_per_sample(self) -> float:
        """Return the FLOPs of one image's forward and backward: 2 per multiply-add; a backward is two forwards.

        They include convolutions and the head, but not norms and activations.
        """
        side, multiply_adds = self.image_size, self.head.weight.numel()
        for part in [self.stem, *self.blocks]:
            convolutions = [module for module in part.modules() if isinstance(module, nn.Conv2d)]
            # Only the first convolution of a part has a stride above 1, so the outputs of all have the same size.
            side = -(-side // convolutions[0].stride[0])
            multiply_adds += sum(convolution.weight.numel() for convolution in convolutions) * side**2
        return 3.0 * 2.0 * multiply_adds
