"""Distances of sharded averages, and of a step, on real processes: those of the whole weights, from one all-reduce."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from ema import EMABank, EMAConfig, divergence
from ema.distance import Divergence, drift_slope, live_copy
from tests.makers import MODES, networks, no_collectives, reshard, shake_both
from tests.ranks import RankPool as Ranks

CONFIGS = {
    "a": {"decay": 0.5},
    "b": {"decay": 0.75},
    "low": {"decay": 0.5, "dtype": "bfloat16"},
    "part": {"decay": 0.5, "include": ["blocks.*", "gate.*"]},
    "late": {"start_iter": 99},
}


def equal(found: dict[str, Divergence], expected: dict[str, Divergence]) -> None:
    assert list(found) == list(expected)
    for name, one in expected.items():
        assert found[name].rel_l2 == pytest.approx(one.rel_l2, rel=1e-12), name
        assert found[name].cosine == pytest.approx(one.cosine, rel=1e-12), name
        assert found[name].live_norm == pytest.approx(one.live_norm, rel=1e-12), name
        assert found[name].blocks == pytest.approx(one.blocks, rel=1e-12), name
        assert found[name].horizon == one.horizon


def a_step_is_measured(layout: str, mode: str) -> None:
    whole, sharded = networks(layout)
    reference = EMABank(whole, {name: EMAConfig(**config) for name, config in CONFIGS.items()})  # type: ignore[arg-type]
    bank = EMABank(sharded, {name: EMAConfig(mode=mode, **config) for name, config in CONFIGS.items()})  # type: ignore[arg-type]
    for iteration in range(14):
        shake_both(whole, sharded)
        reference.update(whole, iteration=iteration)
        bank.update(sharded, iteration=iteration)
    with torch.no_grad():
        # Leaves the root unsharded.
        sharded.eval()(torch.ones(2, 5))
    with no_collectives():
        before = live_copy(bank, sharded)
    held = sum(tensor.numel() for tensor in before.shadows.values())
    reshard(sharded)
    assert held == sum(getattr(p, "_local_tensor", p).numel() for p in sharded.parameters())
    then = live_copy(reference, whole)
    shake_both(whole, sharded)
    with no_collectives(expected=1):
        found = divergence({**bank, "step": before}, sharded)
    expected = divergence({**reference, "step": then}, whole)
    assert found["step"].rel_l2 > 0
    equal(found, expected)
    slope = drift_slope(expected)
    assert slope is not None and drift_slope(found) == pytest.approx(slope, rel=1e-9)
    with no_collectives(expected=1):
        alone = divergence({"step": before}, sharded)
    equal(alone, {"step": expected["step"]})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("world", "layout"), [(2, "fsdp"), (4, "fsdp"), (4, "hsdp"), (2, "none"), (2, "partial")]
)
def test_a_step_is_measured_with_the_averages_in_one_all_reduce(
    ranks: Ranks, world: int, layout: str, mode: str
) -> None:
    ranks(world, a_step_is_measured, layout, mode)


def large_and_small() -> None:
    """Shards that are read in slices, and blocks that are whole on every rank beside sharded ones."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2,))
    whole, sharded = (nn.ModuleDict({"big": nn.Linear(500, 601), "few": nn.Linear(3, 1)}) for _ in range(2))
    sharded.load_state_dict(whole.state_dict())
    fully_shard(sharded["big"], mesh=mesh)
    reference, bank = (
        EMABank(model, {"a": EMAConfig(decay=0.9, mode="local_shard")}) for model in (whole, sharded)
    )
    for iteration in range(3):
        reference.update(whole, iteration=iteration)
        bank.update(sharded, iteration=iteration)
        for left, right in zip(whole.parameters(), sharded.parameters(), strict=True):
            step = torch.randn_like(left)
            left.data.add_(step)
            right.data.add_(
                distribute_tensor(step, mesh, right.placements, src_data_rank=None)  # type: ignore[attr-defined]
                if hasattr(right, "placements")
                else step
            )
    one_block = {"block_of": lambda name: "all"}
    equal(divergence(bank, sharded), divergence(reference, whole))
    equal(divergence(bank, sharded, **one_block), divergence(reference, whole, **one_block))
    assert dist.get_world_size() == 2


def test_sharded_and_whole_tensors_of_one_block_count_once_each(ranks: Ranks) -> None:
    ranks(2, large_and_small)
