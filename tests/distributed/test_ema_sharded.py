"""Averages of sharded models on real processes: both modes equal the average of the whole weights.

The expected numbers are the recursion on the unsharded weights, computed on every rank from the same random steps.
Shapes are chosen for uneven and empty shards: 7 rows on 4 ranks, 1 row on 2.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ema import EMABank, EMAConfig, ExponentialMovingAverage
from ema.rules import profile
from ema.swap import weights_swapped_into
from tests.makers import MODES, assert_same, full, networks, no_collectives, reshard, shake_both
from tests.ranks import RankPool as Ranks


def both_modes_follow(layout: str, config: dict[str, Any]) -> None:
    for mode, device in [*((mode, None) for mode in MODES), ("local_shard", "cpu")]:
        whole, sharded = networks(layout)
        reference = ExponentialMovingAverage(whole, EMAConfig(**config))
        average = ExponentialMovingAverage(sharded, EMAConfig(mode=mode, device=device, **config))
        for iteration in range(10):
            shake_both(whole, sharded)
            if iteration % 3 == 1:
                with torch.no_grad():
                    # Leaves the root's parameters unsharded.
                    sharded.eval()(torch.ones(4, 5))
            reference.update(whole, iteration=iteration)
            if mode == "local_shard":
                with no_collectives():
                    average.update(sharded, iteration=iteration)
            else:
                average.update(sharded, iteration=iteration)
        assert_same(average.state_dict(), reference.state_dict())
        assert average.track.walk.version == 1, "an unsharded root is no reason to walk the model again"


CONFIGS = [
    {"decay": 0.9},
    {"decay": 0.9, "dtype": "bfloat16", "start_iter": 2},
    {"type": "power", "gamma": 6.94, "update_every": 3, "start_iter": 1},
]


@pytest.mark.parametrize("config", CONFIGS, ids=["constant", "bf16_late", "power_every_3"])
@pytest.mark.parametrize(
    ("world", "layout"),
    [(1, "none"), (1, "fsdp"), (2, "fsdp"), (4, "fsdp"), (2, "none"), (4, "hsdp"), (2, "partial")],
)
def test_both_modes_equal_the_unsharded_average_bit_for_bit(
    ranks: Ranks, world: int, layout: str, config: Any
) -> None:
    ranks(world, both_modes_follow, layout, config)


def impulse_response(rows: int) -> None:
    """theta_t = e_t along the sharded dimension: the gathered shadow is the profile."""
    config = {"type": "warmup", "decay": 0.8, "update_every": 2}
    for mode in MODES:
        model = nn.Linear(1, rows, bias=False, dtype=torch.float64)
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        average = ExponentialMovingAverage(model, EMAConfig(mode=mode, dtype=None, **config))
        for t in range(rows):
            one_hot = torch.zeros(rows, 1, dtype=torch.float64)
            one_hot[t] = 1
            live = model.weight
            with torch.no_grad():
                live.copy_(distribute_tensor(one_hot, live.device_mesh, live.placements, src_data_rank=None))
            average.update(model, iteration=t)
        expected = torch.tensor(profile(EMAConfig(**config), rows - 1), dtype=torch.float64)
        torch.testing.assert_close(full(average.state_dict()["weight"])[:, 0], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("world", "rows"), [(1, 5), (2, 1), (2, 7), (4, 7), (4, 2)])
def test_the_impulse_response_survives_uneven_and_empty_shards(ranks: Ranks, world: int, rows: int) -> None:
    ranks(world, impulse_response, rows)


def bytes_held(mode: str) -> tuple[int, int]:
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)])
    total = sum(p.numel() * 4 for p in model.parameters())
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    state = ExponentialMovingAverage(model, EMAConfig(mode=mode)).state_dict()
    shadows = [value for name, value in state.items() if not name.startswith("_ema")]
    local = [s.to_local() if isinstance(s, DTensor) else s for s in shadows]
    return sum(part.untyped_storage().nbytes() for part in local), total


def test_a_local_shard_takes_its_share_of_the_bytes_and_full_tensor_all(ranks: Ranks) -> None:
    for held, total in ranks(4, bytes_held, "local_shard"):
        assert held == pytest.approx(total / 4, rel=0.02)
    for held, total in ranks(2, bytes_held, "full_tensor"):
        assert held == total


def a_bank_gathers_once() -> None:
    _, model = networks("fsdp")
    configs = {
        name: EMAConfig(decay=0.9, dtype=dtype) for name, dtype in (("a", "float32"), ("b", "bfloat16"))
    }
    bank = EMABank(model, {**configs, "c": EMAConfig(mode="local_shard")})
    with no_collectives(expected=sum(1 for _ in model.parameters())):
        bank.update(model, iteration=0)
    local = EMABank(
        model, {"c": EMAConfig(mode="local_shard"), "d": EMAConfig(mode="local_shard", dtype="bfloat16")}
    )
    for iteration in range(2):
        with no_collectives():
            local.update(model, iteration=iteration, finite=iteration == 0)


def test_a_bank_gathers_each_parameter_once_and_local_shards_never(ranks: Ranks) -> None:
    ranks(2, a_bank_gathers_once)


def broken_on_one_rank() -> list[Any]:
    _, model = networks("fsdp")
    average = ExponentialMovingAverage(model, EMAConfig(mode="local_shard", decay=0.5, check_finite=True))
    average.update(model, iteration=0)
    before = {name: full(value).clone() for name, value in average.state_dict().items()}
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.wide.weight.to_local()[0, 0] = float("nan")
    with no_collectives(expected=1):
        average.update(model, iteration=1)
    after = average.state_dict()
    assert all(torch.equal(full(after[name]), value) for name, value in before.items() if "_ema" not in name)
    return [average.num_updates, average.num_skipped]


def nothing_to_average_here(device: str | None) -> None:
    """One row on two ranks: the second rank's shards of what is averaged are all empty."""
    _, sharded = networks("fsdp")
    config = EMAConfig(mode="local_shard", include=["gate.weight"], device=device)
    average = ExponentialMovingAverage(sharded, config)
    for iteration in range(3):
        average.update(sharded, iteration=iteration)
    average.wait()
    assert average.num_updates == 3


def test_a_rank_that_holds_nothing_of_an_average_goes_along(ranks: Ranks) -> None:
    for device in (None, "cpu"):
        ranks(2, nothing_to_average_here, device)


def whole_averages_stay_in_the_foreground() -> None:
    for change in ({"device": "cpu"}, {"overlap": True}):
        _, sharded = networks("fsdp")
        with pytest.raises(ValueError, match=r"EMAConfig\.mode: expected local_shard .* got 'full_tensor'"):
            ExponentialMovingAverage(sharded, EMAConfig(mode="full_tensor", **change))


def test_a_sharded_average_kept_whole_is_not_updated_in_the_background(ranks: Ranks) -> None:
    """Its update is a collective, which belongs into the order of the program."""
    ranks(2, whole_averages_stay_in_the_foreground)


def test_a_step_that_is_broken_on_one_rank_is_skipped_on_all(ranks: Ranks) -> None:
    assert ranks(2, broken_on_one_rank) == [[1, 1], [1, 1]]


def sharded_too_late() -> None:
    model = nn.Linear(4, 4)
    average = ExponentialMovingAverage(model, EMAConfig(mode="local_shard"))
    gathered = ExponentialMovingAverage(model, EMAConfig())
    expected = model.weight.detach().clone()
    dist.broadcast(expected, src=0)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match="'weight': expected the sharding that the model had"):
        average.update(model, iteration=0)
    gathered.update(model, iteration=0)
    assert torch.equal(gathered.state_dict()["weight"], expected)
    with pytest.raises(ValueError, match=r"EMAConfig.fsdp2: expected True .*'weight' is a DTensor"):
        ExponentialMovingAverage(model, EMAConfig(fsdp2=False))


def test_an_average_made_before_sharding_is_refused_where_it_cannot_follow(ranks: Ranks) -> None:
    ranks(2, sharded_too_late)


def data_parallel() -> None:
    whole, model = networks("none")
    wrapped = nn.parallel.DistributedDataParallel(model)
    average = ExponentialMovingAverage(wrapped, EMAConfig(decay=0.5))
    reference = ExponentialMovingAverage(whole, EMAConfig(decay=0.5))
    for iteration in range(3):
        shake_both(whole, model)
        reference.update(whole, iteration=iteration)
        with no_collectives():
            average.update(wrapped if iteration else model, iteration=iteration)
    assert_same(average.state_dict(), reference.state_dict())


def test_data_parallel_wrapping_changes_nothing(ranks: Ranks) -> None:
    ranks(2, data_parallel)


def tied() -> None:
    model = nn.Module()
    model.embedding = nn.Embedding(7, 3)
    model.head = nn.Linear(3, 7, bias=False)
    model.head.weight = model.embedding.weight
    model.forward = lambda tokens: model.head(model.embedding(tokens))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    average = ExponentialMovingAverage(model, EMAConfig(mode="local_shard", decay=0.5))
    average.update(model, iteration=0)
    before = full(model.head.weight.detach()).clone()
    with torch.no_grad():
        model.head.weight.to_local().add_(1)
    average.update(model, iteration=1)
    state = average.state_dict()
    assert state["head.weight"] is state["embedding.weight"]
    torch.testing.assert_close(full(state["head.weight"]), before + 0.5)


def test_tied_weights_are_averaged_once_when_sharded(ranks: Ranks) -> None:
    ranks(2, tied)


def combining(layout: str, mode: str) -> None:
    whole, sharded = networks(layout)
    configs = {"a": EMAConfig(decay=0.5), "b": EMAConfig(decay=0.9)}
    reference = EMABank(whole, configs)
    bank = EMABank(sharded, {name: replace(config, mode=mode) for name, config in configs.items()})
    for iteration in range(3):
        shake_both(whole, sharded)
        reference.update(whole, iteration=iteration)
        bank.update(sharded, iteration=iteration)
    with torch.no_grad():
        sharded(torch.randn(6, 5))  # FSDP2 leaves the root unsharded
    coefficients = {"a": 2.0, "b": -1.5}
    expected = reference.combined(whole, coefficients, live=0.5)
    with no_collectives():
        found = bank.combined(sharded, coefficients, live=0.5)
    assert_same(found, expected)
    with weights_swapped_into(sharded, found):
        for name, parameter in sharded.named_parameters():
            assert torch.equal(full(parameter), expected[name])
    reshard(sharded)
    for left, right in zip(whole.parameters(), sharded.parameters(), strict=True):
        assert torch.equal(full(right), left)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("world", "layout"), [(2, "fsdp"), (4, "hsdp")])
def test_each_rank_combines_its_own_part_of_the_averages(
    ranks: Ranks, world: int, layout: str, mode: str
) -> None:
    ranks(world, combining, layout, mode)
