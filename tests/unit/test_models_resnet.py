"""ResNet: sizes of the stages, BatchNorm, the start as its shortcuts."""

import torch
import torch.nn.functional as F

from models.resnet import ResNet


def small_resnet() -> ResNet:
    torch.manual_seed(0)
    return ResNet(in_channels=1, num_classes=10, widths=[4, 8, 16], blocks_per_stage=2, image_size=8)


def test_stages_keep_then_halve_the_image() -> None:
    model, sizes = small_resnet(), []
    for block in model.shard_blocks():
        block.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    model(torch.randn(2, 1, 8, 8))
    assert sizes == [(4, 8, 8), (4, 8, 8), (8, 4, 4), (8, 4, 4), (16, 2, 2), (16, 2, 2)]


def test_a_block_starts_as_its_shortcut() -> None:
    block = small_resnet().shard_blocks()[1].eval()
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x), F.relu(x))


def test_running_statistics_move_in_training_only() -> None:
    model = small_resnet()
    images = torch.randn(16, 1, 8, 8) + 3
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.eval()(images)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    model.train()(images)
    assert [name for name, buffer in model.named_buffers() if torch.equal(before[name], buffer)] == []


def test_other_image_sizes_are_welcome() -> None:
    assert small_resnet()(torch.randn(2, 1, 15, 11)).shape == (2, 10)
