"""Every model under FSDP2 on real gloo ranks: the same numbers as unsharded, from meta to optimizer step."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from models.dit import DiT
from models.gpt import GPT
from models.mlp import MLP
from models.resnet import ResNet
from tests.makers import full
from tests.ranks import RankPool

ARGUMENTS = {
    GPT: {"vocab_size": 13, "context": 8, "n_layer": 2, "n_head": 2, "n_embd": 20},
    DiT: {
        "image_size": 4,
        "patch_size": 2,
        "in_channels": 1,
        "hidden": 20,
        "depth": 2,
        "heads": 1,
        "num_classes": 3,
    },
    ResNet: {"in_channels": 1, "num_classes": 3, "widths": [3, 6], "blocks_per_stage": 1},
    MLP: {"in_features": 16, "hidden": 7, "depth": 2, "num_classes": 3},
}
Build = Callable[..., nn.Module]
every_model = pytest.mark.parametrize("build", ARGUMENTS, ids=lambda build: build.__name__)


def inputs(build: Build) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    if build is GPT:
        return (torch.randint(13, (4, 8), generator=generator),)
    images = torch.randn(4, 1, 4, 4, generator=generator)
    if build is DiT:
        return images, torch.rand(4, generator=generator) * 1000, torch.tensor([0, 1, 2, 3])
    return (images,)


def random_model(build: Build) -> nn.Module:
    """No zeros left: zero gates and heads would make every comparison agree."""
    torch.manual_seed(5)
    model = build(**ARGUMENTS[build])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def shard(model: nn.Module, **options: object) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.shard_blocks():
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def check_forward_backward_and_step(build: Build) -> None:
    plain = random_model(build)
    sharded = shard(copy.deepcopy(plain))
    for model in (plain, sharded):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            model(*inputs(build)).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(sharded(*inputs(build)), plain(*inputs(build)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        sharded.eval()(*inputs(build)), plain.eval()(*inputs(build)), atol=1e-5, rtol=1e-5
    )
    sharded.reshard()
    parameters = dict(plain.named_parameters())
    for name, parameter in sharded.named_parameters():
        assert isinstance(parameter, DTensor), name
        torch.testing.assert_close(full(parameter), parameters[name], atol=1e-5, rtol=1e-5)
    assert sharded.flops_per_sample() == plain.flops_per_sample()


def check_meta_to_initialised(build: Build) -> None:
    """Every value is set, none comes from empty memory; which numbers they are is for the trainer to agree on."""
    with torch.device("meta"):
        model = build(**ARGUMENTS[build])
    shard(model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            local.fill_(float("nan") if local.is_floating_point() else -1)
    model.init_weights()
    reference = build(**ARGUMENTS[build])
    for (name, tensor), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        whole = full(tensor.detach())
        assert whole.isfinite().all(), name
        assert bool(whole.any()) == bool(other.any()), name
        if other.numel() > 100 and other.any():
            assert 0.6 < whole.std() / other.std() < 1.6, name
    for (name, buffer), other in zip(model.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    assert model.eval()(*inputs(build)).isfinite().all()


def check_state_dict(build: Build) -> None:
    plain, sharded = random_model(build), shard(build(**ARGUMENTS[build]))
    whole = StateDictOptions(full_state_dict=True, strict=True)
    set_model_state_dict(sharded, plain.state_dict(), options=whole)
    gathered = get_model_state_dict(sharded, options=whole)
    if dist.get_rank() == 0:
        back = build(**ARGUMENTS[build])
        back.load_state_dict(gathered, strict=True)
        assert all(
            torch.equal(back.state_dict()[name], tensor) for name, tensor in plain.state_dict().items()
        )


def check_mixed_precision(build: Build) -> None:
    plain = random_model(build)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    sharded = shard(copy.deepcopy(plain), mp_policy=policy)
    output = sharded(*inputs(build))
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    expected = plain(*inputs(build))
    assert (output.float() - expected).norm() < 0.05 * expected.norm()
    assert all(parameter.grad.dtype == torch.float32 for parameter in sharded.parameters())


@every_model
@pytest.mark.parametrize("world_size", [2])
def test_sharded_training_equals_unsharded(ranks: RankPool, build: Build, world_size: int) -> None:
    ranks(world_size, check_forward_backward_and_step, build)


@every_model
def test_meta_sharded_then_initialised_is_complete(ranks: RankPool, build: Build) -> None:
    ranks(2, check_meta_to_initialised, build)


@every_model
def test_state_dict_round_trips_through_shards(ranks: RankPool, build: Build) -> None:
    ranks(2, check_state_dict, build)


@every_model
def test_bfloat16_parameters_stay_close_to_float32(ranks: RankPool, build: Build) -> None:
    ranks(2, check_mixed_precision, build)
