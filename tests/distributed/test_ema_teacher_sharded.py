"""A teacher forward of a sharded model, between a forward and its backward, against the whole weights."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ema import EMAConfig, ExponentialMovingAverage
from tests.makers import MODES, Net, full, networks, shake_both
from tests.ranks import RankPool as Ranks


def averaged(layout: str, **config: Any) -> tuple[Net, nn.Module, ExponentialMovingAverage, Net]:
    """A whole network and a sharded one after three steps, the sharded one's average, and the whole average."""
    whole, sharded = networks(layout)
    reference = ExponentialMovingAverage(whole, EMAConfig(decay=0.5))
    average = ExponentialMovingAverage(sharded, EMAConfig(decay=0.5, **config))
    for iteration in range(3):
        shake_both(whole, sharded)
        reference.update(whole, iteration=iteration)
        average.update(sharded, iteration=iteration)
    shake_both(whole, sharded)
    teacher = copy.deepcopy(whole)
    reference.copy_to(teacher)
    return whole, sharded, average, teacher


def gradients(
    model: nn.Module, x: Tensor, average: ExponentialMovingAverage | None, train: bool
) -> list[Tensor]:
    model.zero_grad()
    student = model.train()(x)
    if average is not None:
        average.forward(model, x, train=train)
    student.square().sum().backward()
    return [full(parameter.grad) for parameter in model.parameters()]


def teaches(layout: str, mode: str) -> None:
    _, sharded, average, teacher = averaged(layout, mode=mode)
    x = torch.randn(6, 5)
    expected = gradients(sharded, x, None, False)
    for train in (False, True):
        shadow = average.state_dict(snapshot=True)
        live = {name: full(tensor).clone() for name, tensor in sharded.state_dict().items()}
        with torch.no_grad():
            wanted = copy.deepcopy(teacher).train(train)(x)
        torch.testing.assert_close(average.forward(sharded, x, train=train), wanted, rtol=1e-6, atol=1e-6)
        found = {name: full(tensor) for name, tensor in sharded.state_dict().items()}
        assert all(torch.equal(found[name], tensor) for name, tensor in live.items())
        assert all(torch.equal(full(t), full(shadow[n])) for n, t in average.state_dict().items())
        for left, right in zip(gradients(sharded, x, average, train), expected, strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("world", "layout"), [(2, "fsdp"), (4, "hsdp"), (2, "partial")])
def test_a_teacher_equals_the_whole_average_and_changes_no_gradient(
    ranks: Ranks, world: int, layout: str, mode: str
) -> None:
    ranks(world, teaches, layout, mode)


class Wide(nn.Module):
    """Blocks of uneven rows, with activation checkpointing or compiled if asked for."""

    def __init__(self, wrap: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(5, 3)
        self.fails = False
        for block in self.blocks:
            if wrap == "compile":
                block.compile(backend="aot_eager")
            elif wrap == "checkpoint":
                block.forward = _checkpointed(block.forward)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if self.fails:
            raise ZeroDivisionError
        return self.head(x)


def _checkpointed(forward: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(forward, x, use_reentrant=False)


def sharded_as(how: str, wrap: str, dtype: torch.dtype, **options: Any) -> Any:
    torch.manual_seed(0)
    model = Wide(wrap).to(dtype)
    if how == "ddp":
        return DistributedDataParallel(model)
    for part in (*model.blocks, model):
        fully_shard(part, **options)
    return model


HOW = {
    "checkpointed": ("fsdp", "checkpoint", torch.float32, {}, {}),
    "compiled": ("fsdp", "compile", torch.float32, {}, {}),
    "kept_gathered": ("fsdp", "", torch.float32, {"reshard_after_forward": False}, {}),
    "half_gathered": ("fsdp", "", torch.float32, {"reshard_after_forward": 2}, {}),  # of four ranks
    "mixed": ("fsdp", "", torch.float32, {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}, {}),
    "bf16_live": ("fsdp", "", torch.bfloat16, {}, {}),
    "float64_shadow": ("fsdp", "", torch.float32, {}, {"dtype": "float64"}),
    "on_host": ("fsdp", "", torch.float32, {}, {"device": "cpu"}),
    "ddp": ("ddp", "", torch.float32, {}, {"mode": "full_tensor"}),
    "ddp_checkpointed": ("ddp", "checkpoint", torch.float32, {}, {"mode": "full_tensor"}),
    "ddp_compiled": ("ddp", "compile", torch.float32, {}, {"mode": "full_tensor"}),
}


def same_as_a_second_model(case: str) -> None:
    """The average in a second model that is sharded alike gives the same bits; the step is that of a twin."""
    how, wrap, dtype, options, settings = HOW[case]
    model, twin, teacher = (sharded_as(how, wrap, dtype, **options) for _ in range(3))
    average = ExponentialMovingAverage(model, EMAConfig(**{"mode": "local_shard", "decay": 0.5} | settings))
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (model, twin)]
    for iteration in range(4):
        torch.manual_seed(iteration)
        x = torch.randn(6, 5, dtype=dtype)
        average.copy_to(teacher)
        with torch.no_grad():
            wanted = teacher.eval()(x)
        for net, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            first = net.train()(x)
            if net is model:
                assert torch.equal(average.forward(model, x), wanted)
                inner = model.module if how == "ddp" else model
                inner.fails = True
                with pytest.raises(ZeroDivisionError):
                    average.forward(model, x)
                inner.fails = False
            (first - wanted).square().sum().backward()
            optimizer.step()
        average.update(model, iteration=iteration)
        for left, right in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(full(left.grad), full(right.grad)), iteration
            assert torch.equal(full(left), full(right)), iteration


@pytest.mark.parametrize("case", HOW)
def test_a_teacher_equals_a_second_model_and_leaves_the_step_alone(ranks: Ranks, case: str) -> None:
    ranks(4 if case == "half_gathered" else 2, same_as_a_second_model, case)


def gathers_in_the_usual_order() -> None:
    """A backward prefetches as without a teacher, and a prefetch that is pending gives no live weights."""
    model = sharded_as("fsdp", "", torch.float32)
    average = ExponentialMovingAverage(model, EMAConfig(mode="local_shard"))
    average.update(model, iteration=0)
    x = torch.randn(6, 5)
    wanted = average.forward(model, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.unshard(async_op=True)
    assert torch.equal(average.forward(model, x), wanted)
    counts = []
    for teaches in (False, True):
        student = model(x)
        if teaches:
            assert torch.equal(average.forward(model, x), wanted)
        with CommDebugMode() as counted:
            student.sum().backward()
        counts.append(counted.get_total_counts())
    # The root stays gathered between a forward and its backward; after a teacher it is gathered again.
    assert counts[1] == counts[0] + 1, counts


def test_a_teacher_does_not_disturb_prefetching(ranks: Ranks) -> None:
    ranks(2, gathers_in_the_usual_order)
