"""Sharded averages through checkpoints: saved at one number of processes, loaded at others.

The expected state is that of the same bank over the unsharded network.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ema import EMABank, EMAConfig, ExponentialMovingAverage
from tests.makers import MODES, assert_same, full, networks, shake, shake_both
from tests.ranks import RankPool as Ranks


def save(folder: str, layout: str, mode: str) -> None:
    import torch.distributed.checkpoint as dcp

    whole, sharded = networks(layout)
    bank = EMABank(sharded, bank_configs(mode))
    for iteration in range(5):
        shake_both(whole, sharded)
        bank.update(sharded, iteration=iteration)
    dcp.save({"ema": bank.state_dict()}, checkpoint_id=folder)


def load(folder: str, layout: str, mode: str) -> None:
    import torch.distributed.checkpoint as dcp

    whole, sharded = networks(layout)
    expected = EMABank(whole, bank_configs("full_tensor"))
    for iteration in range(5):
        shake(whole)
        expected.update(whole, iteration=iteration)
    bank = EMABank(sharded, bank_configs(mode))
    state = {"ema": bank.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    bank.load_state_dict(state["ema"])
    assert_same(bank.state_dict(), expected.state_dict())
    assert bank["b"].last_iteration == 4 and bank["b"].started


def bank_configs(mode: str) -> dict[str, EMAConfig]:
    return {
        "a": EMAConfig(decay=0.9, mode=mode),
        "b": EMAConfig(type="power", start_iter=1, dtype=None, mode=mode),
    }


SAVES: list[tuple[int, str, str]] = [
    (4, "fsdp", "local_shard"),
    (4, "hsdp", "local_shard"),
    (2, "fsdp", "full_tensor"),
]
LOADS: list[tuple[int, str, str]] = [
    (4, "fsdp", "local_shard"),
    (3, "fsdp", "local_shard"),
    (2, "fsdp", "local_shard"),
    (2, "fsdp", "full_tensor"),
    (1, "none", "local_shard"),
]


@pytest.mark.parametrize("saved", SAVES, ids=lambda case: "-".join(map(str, case)))
def test_saved_at_one_world_size_and_loaded_at_others_is_equal(
    ranks: Ranks, tmp_path: Any, saved: Any
) -> None:
    ranks(saved[0], save, str(tmp_path), *saved[1:])
    for world, layout, mode in LOADS:
        ranks(world, load, str(tmp_path), layout, mode)


def takes_any_form() -> None:
    """A whole tensor, a shard of another placement: load_state_dict writes the same values."""
    whole, sharded = networks("fsdp")
    given: dict[str, Tensor] = {name: torch.randn_like(p) for name, p in whole.named_parameters()}
    given |= {name: b.clone() for name, b in whole.named_buffers()}
    forms: list[Callable[[DTensor, Tensor], Tensor]] = [
        lambda live, value: value,
        lambda live, value: distribute_tensor(value, live.device_mesh, live.placements, src_data_rank=None),
        lambda live, value: distribute_tensor(value, live.device_mesh, src_data_rank=None),
    ]
    for mode in MODES:
        for form in forms:
            average = ExponentialMovingAverage(sharded, EMAConfig(mode=mode))
            parameters = dict(sharded.named_parameters())
            average.load_state_dict(
                {n: form(parameters[n], v) if n in parameters else v for n, v in given.items()}
            )
            found = average.state_dict()
            assert all(torch.equal(full(found[name]), value) for name, value in given.items())
        shard_alone = given | {"wide.weight": parameters["wide.weight"].detach().to_local()}
        with pytest.raises(ValueError, match=r"'wide.weight': expected shape \(7, 5\)"):
            average.load_state_dict(shard_alone)


def test_a_state_loads_whole_or_sharded_in_any_way(ranks: Ranks) -> None:
    ranks(2, takes_any_form)


def save_while_training(folder: str) -> None:
    import torch.distributed.checkpoint as dcp

    whole, sharded = networks("fsdp")
    bank = EMABank(sharded, bank_configs("local_shard"))
    for iteration in range(5):
        shake_both(whole, sharded)
        bank.update(sharded, iteration=iteration)
    saving = dcp.async_save({"ema": bank.state_dict(snapshot=True)}, checkpoint_id=folder)
    for iteration in range(5, 10):
        shake_both(whole, sharded)
        bank.update(sharded, iteration=iteration)
    saving.result()


def test_a_snapshot_is_saved_while_training_goes_on(ranks: Ranks, tmp_path: Any) -> None:
    """What is found in the checkpoint is the average of the moment of the snapshot."""
    ranks(2, save_while_training, str(tmp_path))
    ranks(1, load, str(tmp_path), "none", "local_shard")
