"""Names, ties, buffers, frozen and replaced parameters in every implementation. Decay 1/2: numbers by hand."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.peers.loops import Loop, compare, fill, scalar


def column(*values: float) -> nn.Sequential:
    """Layers of one weight each."""
    return nn.Sequential(*[scalar(value) for value in values])


def weights(model: nn.Module) -> list[float]:
    return [float(p.detach().float().mean()) for p in model.parameters()]


def published(loop: Loop, target: nn.Module) -> list[float]:
    loop.publish(target)
    return weights(target)


def wrapped_later(make: type[Loop]) -> list[float]:
    """Layers 0 and 10, the first wrapped for activation checkpointing after the average was made; both move by 1."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = column(0.0, 10.0)
    loop = make(model)
    loop.absorb()
    model[0] = checkpoint_wrapper(model[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    loop.absorb()
    model[0] = model[0]._checkpoint_wrapped_module
    return published(loop, column(-1.0, -1.0))


@pytest.mark.parametrize(
    ("peer", "known"),
    [
        ("torch", [0.5, 10.5]),
        ("diffusers", [0.5, 10.5]),
        ("lightning", [0.5, 10.5]),
        ("torch_ema", [0.5, 10.5]),
        ("ema_pytorch", [5.5, 10.0]),
    ],
)
def test_a_wrapper_put_on_later_changes_no_name(peer: str, known: Any) -> None:
    """ema-pytorch filters one side by name and pairs by position: the first layer is averaged with the second."""
    compare(wrapped_later, [0.5, 10.5], peer, known)


def another_model(make: type[Loop]) -> list[float]:
    """An update with a model that lost its last layer."""
    model = column(0.0, 0.0)
    loop = make(model)
    loop.absorb()
    del model[1]
    fill(model, 1.0)
    loop.absorb()
    return published(loop, column(-1.0, -1.0))


@pytest.mark.parametrize(
    ("peer", "known"),
    [
        ("torch", [0.5, 0.0]),
        ("ema_pytorch", [0.5, 0.0]),
        ("diffusers", [0.5, 0.0]),
        ("torch_ema", "ValueError"),
    ],
)
def test_a_model_that_lacks_a_parameter_is_refused(peer: str, known: Any) -> None:
    """They pair by position up to the shorter side. torch-ema notices, if nothing else holds the old tensor."""
    compare(another_model, "KeyError", peer, known)


def wide_target(make: type[Loop]) -> list[float]:
    """A [1, 1] average published into a [1, 4] layer."""
    loop = make(scalar(3.0))
    loop.absorb()
    return published(loop, nn.Linear(4, 1, bias=False))


@pytest.mark.parametrize(
    ("peer", "known"), [("torch", "RuntimeError"), ("diffusers", [3.0]), ("torch_ema", [3.0])]
)
def test_a_wrong_shape_is_refused_not_broadcast(peer: str, known: Any) -> None:
    compare(wide_target, "ValueError", peer, known)


def broken_state(make: type[Loop]) -> str:
    """A saved average with its last tensor missing, then with the first one of another shape: loaded or refused?"""
    answers = []
    for breakage in (_without_the_last, _with_another_shape):
        loop = make(column(0.0, 0.0))
        loop.absorb()
        state = breakage(copy.deepcopy(loop.save()))
        try:
            loop.load(state)
            answers.append("taken")
        except (KeyError, ValueError, RuntimeError):
            answers.append("refused")
    return ", ".join(answers)


def _tensors(state: Any) -> Any:
    if isinstance(state, tuple):
        return state[0]["state_dict"]
    return state.get("shadow_params", state)


def _without_the_last(state: Any) -> Any:
    tensors = _tensors(state)
    if isinstance(tensors, list):
        tensors.pop()
    else:
        del tensors[[name for name in tensors if name.endswith("1.weight")][-1]]
    return state


def _with_another_shape(state: Any) -> Any:
    tensors = _tensors(state)
    key = 0 if isinstance(tensors, list) else next(name for name in tensors if name.endswith("0.weight"))
    tensors[key] = torch.zeros(1, 4)
    return state


@pytest.mark.parametrize(
    ("peer", "known"),
    [
        ("torch", "refused, refused"),
        ("ema_pytorch", "refused, refused"),
        ("lightning", "refused, refused"),
        ("torch_ema", "refused, taken"),
        ("diffusers", "taken, taken"),
    ],
)
def test_a_broken_state_is_refused(peer: str, known: Any) -> None:
    compare(broken_state, "refused, refused", peer, known)


def empty_state(make: type[Loop]) -> str:
    loop = make(scalar(0.0))
    loop.load({})
    return "taken"


def test_an_empty_state_is_refused() -> None:
    """A checkpoint without an average must not pass for one: the shadow would be the constructor's weights."""
    compare(empty_state, "KeyError", "diffusers", "taken")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = scalar(0.0), scalar(0.0)
        self.outer.weight = self.inner.weight


def tied(make: type[Loop]) -> list[float]:
    model = Tied()
    loop = make(model)
    loop.absorb()
    fill(model, 1.0)
    loop.absorb()
    return published(loop, Tied())


@pytest.mark.parametrize("peer", ["torch", "ema_pytorch", "diffusers", "lightning", "torch_ema"])
def test_tied_weights_are_averaged_once(peer: str) -> None:
    """Twice at decay 1/2 would be 0.75. All of these are right; timm walks the state dict, where a tie shows twice."""
    compare(tied, [0.5], peer, [0.5])


def normed(count: int = 0, mean: float = 0.0, flag: bool = False) -> nn.BatchNorm1d:
    model = nn.BatchNorm1d(1)
    model.register_buffer("flag", torch.tensor(flag))
    model.num_batches_tracked.fill_(count)
    model.running_mean.fill_(mean)
    return model


def buffers(make: type[Loop]) -> list[float]:
    """Counter 10 then 13, flag on then off, running mean 0 then 1; published into a fresh model."""
    model = normed(10, 0.0, True)
    loop = make(model)
    loop.absorb()
    model.num_batches_tracked.add_(3)
    model.flag.fill_(False)
    model.running_mean.fill_(1.0)
    loop.absorb()
    target = normed()
    loop.publish(target)
    return [
        float(target.num_batches_tracked.item()),
        float(target.flag.item()),
        float(target.running_mean.item()),
    ]


@pytest.mark.parametrize(
    ("peer", "known"),
    [
        ("torch", [13.0, 0.0, 1.0]),
        ("torch_buffers", [11.0, 1.0, 0.5]),
        ("lightning", [11.0, 1.0, 0.5]),
        ("ema_pytorch", [10.0, 1.0, 0.5]),
        ("diffusers", [0.0, 0.0, 0.0]),
        ("torch_ema", [0.0, 0.0, 0.0]),
    ],
)
def test_buffers_are_copied_exactly(peer: str, known: Any) -> None:
    """A counter is no average: 11 is (10 + 13) / 2 cut off, 10 is never brought up to date, 0 is not published."""
    compare(buffers, [13.0, 0.0, 1.0], peer, known)


def one_batch_later(make: type[Loop]) -> float:
    """A step counter that goes 1, 2, 3, ... 10, at decay 0.9."""
    model = normed()
    loop = make(model, 0.9)
    for _ in range(10):
        model.num_batches_tracked.add_(1)
        loop.absorb()
    target = normed()
    loop.publish(target)
    return float(target.num_batches_tracked.item())


@pytest.mark.parametrize(
    ("peer", "known"), [("torch", 10.0), ("torch_buffers", 1.0), ("lightning", 1.0), ("ema_pytorch", 0.0)]
)
def test_an_integer_buffer_does_not_stand_still(peer: str, known: Any) -> None:
    """0.9 * 1 + 0.1 * 2 is 1 in whole numbers, and so on for ever."""
    compare(one_batch_later, 10.0, peer, known)


def frozen_share(make: type[Loop]) -> int:
    """Elements kept for a model of 1 trainable weight beside 10,000 frozen ones."""
    model = nn.Sequential(nn.Linear(100, 100, bias=False).requires_grad_(False), scalar(0.0))
    loop = make(model)
    loop.absorb()
    return loop.held()


@pytest.mark.parametrize(
    ("peer", "known"),
    [
        ("torch", 10_001),
        ("ema_pytorch", 10_001),
        ("diffusers", 10_001),
        ("torch_ema", 10_001),
        ("lightning", 10_001),
    ],
)
def test_frozen_parameters_are_not_tracked(peer: str, known: Any) -> None:
    """Given the whole model. Lists of parameters may leave them out, and then cannot publish into a whole one."""
    compare(frozen_share, 1, peer, known)


def replaced(make: type[Loop]) -> list[float]:
    """The live Parameter is replaced by a new one (10) while an optimizer still holds the old one (0)."""
    model = scalar(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loop = make(model)
    loop.absorb()
    model.weight = nn.Parameter(torch.full((1, 1), 10.0))
    loop.absorb()
    assert optimizer.param_groups[0]["params"][0] is not model.weight
    return published(loop, scalar(-1.0))


@pytest.mark.parametrize(
    ("peer", "known"),
    [
        ("torch", [5.0]),
        ("ema_pytorch", [5.0]),
        ("diffusers", [5.0]),
        ("lightning", [5.0]),
        ("torch_ema", [0.0]),
    ],
)
def test_a_replaced_parameter_is_not_averaged_stale(peer: str, known: Any) -> None:
    """torch-ema holds references to the tensors of the start; the others walk the model at each step."""
    compare(replaced, [5.0], peer, known)


def in_bfloat16(make: type[Loop]) -> float:
    """A bfloat16 model that stands at 1.5 for 100 steps after 1, decay 0.9999."""
    model = scalar(1.0).bfloat16()
    loop = make(model, 0.9999)
    loop.absorb()
    fill(model, 1.5)
    for _ in range(100):
        loop.absorb()
    target = scalar(0.0)
    if isinstance(loop.made, torch.nn.Module):
        target.bfloat16()
    loop.publish(target)
    return float(target.weight.item())


@pytest.mark.parametrize(
    ("peer", "known"),
    [("torch", 1.0), ("ema_pytorch", 1.0), ("diffusers", 1.0), ("lightning", 1.0), ("torch_ema", 1.0)],
)
def test_a_bfloat16_model_gets_an_average_that_moves(peer: str, known: Any) -> None:
    """By default they keep the shadow in the parameter's dtype, where 0.0001 * 0.5 beside 1 rounds to nothing."""
    compare(in_bfloat16, 1.5 - 0.5 * 0.9999**100, peer, known)
