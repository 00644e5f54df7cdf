"""A residual network with BatchNorm for small images (He et al., arXiv:1512.03385, section 4.2)."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.construction import initialised_once, require_positive


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the image's size, or halves it (rounded up) at stride 2."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm whose scale and shift take the dtype of its statistics.

    Sharding in bfloat16 rounds the parameters of a forward and leaves buffers alone; torch refuses the mixture.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[b, channels, h, w]` to the same shape."""
        mean, variance = self.running_mean, self.running_var
        assert mean is not None and self.num_batches_tracked is not None
        if self.training:
            self.num_batches_tracked.add_(1)
        # Without a momentum the statistics are the plain mean over the batches seen, as in torch's own layer.
        momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        scale, shift = self.weight.to(mean.dtype), self.bias.to(mean.dtype)
        return F.batch_norm(x, mean, variance, scale, shift, self.training, momentum, self.eps)


class Block(nn.Module):
    """Two convolutions added to their input, or to its projection where width or size changes."""

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
        """`[b, in_channels, h, w]` to `[b, out_channels, h / stride, w / stride]`."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Class logits of small images. The stem keeps their size; each stage after the first halves it.

    BatchNorm's statistics are those of the images a process sees; in training they differ between processes.

    Args:
        in_channels: channels of the images, at least 1.
        num_classes: number of classes, at least 1.
        widths: channels of each stage, one entry a stage, each at least 1.
        blocks_per_stage: residual blocks in each stage, at least 1.
        image_size: height and width in pixels, at least 1, that FLOPs are counted for; `forward` takes any.

    Raises:
        ValueError: naming an argument that is out of its range.
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
        """Logits `[b, num_classes]` of images `[b, in_channels, h, w]`."""
        x = self.stem(images.to(self.head.weight.dtype))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))

    def init_weights(self) -> None:
        """Set every parameter and buffer, sharded or not.

        He's normal for the convolutions (arXiv:1502.01852, eq. 10), a small one for the head. A block's last
        norm starts at zero, and thereby the block as its shortcut (arXiv:1706.02677, section 5.1).
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
        """The residual blocks, in order."""
        return list(self.blocks)

    def flops_per_sample(self) -> float:
        """FLOPs of one image's forward and backward, 2 per multiply-add, a backward being two forwards.

        Convolutions and the head are counted, norms and activations are not.
        """
        side, multiply_adds = self.image_size, self.head.weight.numel()
        for part in [self.stem, *self.blocks]:
            convolutions = [module for module in part.modules() if isinstance(module, nn.Conv2d)]
            # Only the first of a part strides, so all of them make images of the same size.
            side = -(-side // convolutions[0].stride[0])
            multiply_adds += sum(convolution.weight.numel() for convolution in convolutions) * side**2
        return 3.0 * 2.0 * multiply_adds
