"""Relative L2 and cosine between average and live weights, against the definitions in float64."""

import math

import pytest
import torch
from torch import nn

from ema import EMABank, EMAConfig, ExponentialMovingAverage, divergence
from ema.distance import block_name


def network() -> nn.Module:
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
    model.head = nn.Linear(5, 2)
    return model


@torch.no_grad()
def shake(model: nn.Module, size: float = 1.0) -> None:
    for parameter in model.parameters():
        parameter.add_(size * torch.randn_like(parameter))


def flat(tensors: dict[str, torch.Tensor], prefix: str = "") -> torch.Tensor:
    return torch.cat(
        [t.detach().double().reshape(-1) for name, t in tensors.items() if name.startswith(prefix)]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_definition_whole_and_by_block(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    bank = EMABank(model, {"long": EMAConfig(decay=0.9), "low": EMAConfig(decay=0.5, dtype="bfloat16")})
    for step in range(5):
        shake(model)
        bank.update(model, iteration=step)
    found = divergence(bank, nn.DataParallel(model))
    for name, average in bank.items():
        state = {key: value for key, value in average.state_dict().items() if "_ema" not in key}
        live = dict(model.named_parameters())
        shadow, theta = flat(state), flat(live)
        assert found[name].rel_l2 == pytest.approx(float((shadow - theta).norm() / theta.norm()), rel=1e-6)
        assert found[name].cosine == pytest.approx(
            float(shadow @ theta / shadow.norm() / theta.norm()), rel=1e-6
        )
        assert found[name].decay == pytest.approx(average.config.decay)
        assert list(found[name].blocks) == ["blocks.0", "blocks.1", "blocks.2", "head"]
        for block, value in found[name].blocks.items():
            difference = flat(state, block) - flat(live, block)
            assert value == pytest.approx(float(difference.norm() / flat(live, block).norm()), rel=1e-6)


def test_the_cosine_does_not_cancel_where_the_average_is_close() -> None:
    """At an angle of 1e-6, 1 - cos = 5e-13: far below what a product of fp32 sums can show."""
    model = nn.Linear(1000, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(model.weight)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5, dtype=None))
    average.update(model, iteration=0)
    with torch.no_grad():
        model.weight[0, ::2] += 2e-6
        model.weight[0, 1::2] -= 2e-6
    average.update(model, iteration=1)
    found = divergence({"a": average}, model)["a"]
    assert found.rel_l2 == pytest.approx(1e-6, rel=1e-6)
    assert 1 - found.cosine == pytest.approx(0.5e-12, rel=1e-3)


def test_a_wrong_sign_shows_at_once() -> None:
    """A runaway shadow (ai-toolkit#1034) had a normal training loss; here it is a large rel_l2."""
    model = network()
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.9))
    average.update(model, iteration=0)
    average.load_state_dict({name: -12 * p.detach() for name, p in model.named_parameters()})
    found = divergence({"a": average}, model)["a"]
    assert found.rel_l2 == pytest.approx(13, rel=1e-6) and found.cosine == pytest.approx(-1)


def test_only_what_the_average_tracks_is_measured() -> None:
    model = network()
    bank = EMABank(model, {"head": EMAConfig(decay=0.5, include=["head.*"]), "all": EMAConfig(decay=0.5)})
    bank.update(model, iteration=0)
    shake(model)
    bank.update(model, iteration=1)
    found = divergence(bank, model, block_of=lambda name: name.split(".")[-1])
    assert set(found["head"].blocks) == {"weight", "bias"}
    assert found["head"].blocks["bias"] != found["all"].blocks["bias"]


def test_before_the_start_and_at_zero_it_stays_a_number() -> None:
    model = network()
    average = ExponentialMovingAverage(model, EMAConfig(start_iter=10))
    shake(model)
    found = divergence({"a": average}, model)["a"]
    assert (found.rel_l2, found.cosine, found.decay) == (0, 1, 0)
    nn.init.zeros_(model.head.bias)
    started = ExponentialMovingAverage(model.head, EMAConfig(include=["bias"], decay=1.0))
    started.update(model.head, iteration=0)
    assert divergence({"a": started}, model.head)["a"].rel_l2 == 0
    nn.init.ones_(model.head.bias)
    started.update(model.head, iteration=1)
    nn.init.zeros_(model.head.bias)
    started.load_state_dict({"bias": torch.ones(2)})
    assert divergence({"a": started}, model.head)["a"].rel_l2 == math.inf
    assert divergence({}, model) == {}


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("blocks.3.attention.weight", "blocks.3"),
        ("head.weight", "head"),
        ("theta", "theta"),
        ("layers.x.0.w", "layers"),
    ],
)
def test_blocks_are_named_by_their_number(name: str, block: str) -> None:
    assert block_name(name) == block
