"""What some ranks saved, other numbers of ranks load bit for bit. The reference is the full tensor, or one process.

Layers have 7, 5, 3 and 1 rows: uneven over 2 and 4 ranks, with ranks that hold nothing.
"""

import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.makers import assert_same, save_checkpoint
from tests.ranks import RankPool
from trainer.checkpoint.store import load_checkpoint, newest_checkpoint
from trainer.checkpoint.training_state import load_training_state, training_state
from trainer.errors import ConfigError


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 7), nn.LayerNorm(7), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 1)
    )


def built(layout: str, seed: int) -> nn.Module:
    model: nn.Module = network(seed)
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    else:
        return DistributedDataParallel(model) if layout == "ddp" else model
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    arguments = {"SGD": {"lr": 0.1, "momentum": 0.9}, "AdamW": {"lr": 0.1, "fused": True}}.get(
        name, {"lr": 0.1}
    )
    return getattr(torch.optim, name)(model.parameters(), **arguments)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """The same batch on every rank, so that any number of ranks trains alike."""
    for step in steps:
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()


@torch.no_grad()
def evaluate(model: nn.Module) -> None:
    """Leaves the parameters of FSDP2's root whole: neither what is saved nor what is loaded may be those."""
    model(torch.zeros(1, 4))


def whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: whole(below) for key, below in value.items()}
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.detach().clone() if isinstance(full, Tensor) else full


def save(folder: Path, layout: str, optimizer_name: str, keep: int = 1, step: int = 3) -> Any:
    model = built(layout, seed=0)
    optimizer = make_optimizer(optimizer_name, model)
    train(model, optimizer, range(step))
    evaluate(model)
    state = training_state(model, optimizer)
    save_checkpoint(folder, step, {**state, "step": step}, keep=keep)
    return whole(state)


def load(folder: Path, layout: str, optimizer_name: str, continue_for: int = 0) -> Any:
    model = built(layout, seed=1)
    optimizer = make_optimizer(optimizer_name, model)
    path = newest_checkpoint(folder)
    assert path is not None
    evaluate(model)
    loaded = load_training_state(path, model, optimizer)
    train(model, optimizer, range(loaded["step"], loaded["step"] + continue_for))
    return whole(training_state(model, optimizer))


@pytest.mark.parametrize(
    ("saved", "loaded", "optimizer"),
    [
        ((2, "fsdp"), (2, "fsdp"), "AdamW"),
        ((4, "fsdp"), (2, "fsdp"), "AdamW"),
        ((2, "fsdp"), (1, "fsdp"), "AdamW"),
        ((2, "fsdp"), (3, "fsdp"), "AdamW"),
        ((4, "fsdp"), (1, "none"), "AdamW"),
        ((1, "none"), (4, "fsdp"), "AdamW"),
        ((4, "hsdp"), (2, "fsdp"), "AdamW"),
        ((2, "ddp"), (4, "hsdp"), "AdamW"),
        ((2, "fsdp"), (2, "ddp"), "SGD"),
        ((2, "ddp"), (4, "fsdp"), "SGD"),
    ],
)
def test_any_ranks_load_what_any_ranks_saved(
    ranks: RankPool, tmp_path: Path, saved: tuple[int, str], loaded: tuple[int, str], optimizer: str
) -> None:
    reference = ranks(saved[0], save, tmp_path, saved[1], optimizer)
    for reply in ranks(loaded[0], load, tmp_path, loaded[1], optimizer):
        assert_same(reply, reference[0])


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "NAdam"])
def test_resumed_equals_uninterrupted_under_fsdp(ranks: RankPool, tmp_path: Path, optimizer: str) -> None:
    ranks(2, save, tmp_path / "a", "fsdp", optimizer)
    uninterrupted = ranks(2, save, tmp_path / "b", "fsdp", optimizer, 1, 6)
    for reply in ranks(2, load, tmp_path / "a", "fsdp", optimizer, 3):
        assert_same(reply, uninterrupted[0])


def test_all_ranks_share_one_folder_and_prune_it(ranks: RankPool, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        ranks(2, save, tmp_path, "fsdp", "AdamW", 2, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    files = sorted(path.name for path in (tmp_path / "step-00000003").iterdir())
    assert files == [".metadata", "COMMIT.json", "__0_0.distcp", "__1_0.distcp", "state.json"]


def _load_error(folder: Path) -> str:
    try:
        load(folder, "fsdp", "AdamW")
    except ConfigError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp"])
def test_damage_seen_by_one_rank_is_an_error_on_all(ranks: RankPool, tmp_path: Path, name: str) -> None:
    ranks(2, save, tmp_path, "fsdp", "AdamW")
    file = tmp_path / "step-00000003" / name
    file.write_bytes(file.read_bytes()[:-1])
    first, second = ranks(2, _load_error, tmp_path)
    assert first == second and f"{name} has {file.stat().st_size} bytes" in first


def test_half_written_checkpoint_is_passed_over_and_cleared_by_all(ranks: RankPool, tmp_path: Path) -> None:
    ranks(2, save, tmp_path, "fsdp", "AdamW", 2, 3)
    shutil.copytree(tmp_path / "step-00000003", tmp_path / "step-00000009")
    (tmp_path / "step-00000009" / "COMMIT.json").unlink()
    (tmp_path / "step-00000010.tmp").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000003"
    ranks(2, save, tmp_path, "fsdp", "AdamW", 2, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def _save_plain_shards(folder: Path) -> str:
    try:
        save_checkpoint(folder, 1, {"a": torch.ones(2), "shard": torch.ones(3 + dist.get_rank())}, keep=1)
    except ValueError as error:
        return str(error)
    return "saved"


def test_plain_local_shards_are_refused_by_name(ranks: RankPool, tmp_path: Path) -> None:
    replies = ranks(2, _save_plain_shards, tmp_path)
    assert all("ranks differ in shard;" in reply for reply in replies)
    assert newest_checkpoint(tmp_path) is None


def _write_error(folder: Path) -> str:
    try:
        save_checkpoint(folder, 1, {"a": torch.ones(2)}, keep=1)
    except OSError as error:
        return type(error).__name__
    return "saved"


def test_error_of_the_first_rank_is_raised_on_all(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert ranks(2, _write_error, tmp_path / "file" / "checkpoints") == ["NotADirectoryError"] * 2


def _whole_and_part(folder: Path) -> bool:
    model = built("fsdp", seed=1)
    state = training_state(model, make_optimizer("AdamW", model))["model"]
    path = newest_checkpoint(folder)
    assert path is not None
    load_checkpoint(path, {"model": {"0.weight": state["0.weight"]}})
    plain = torch.zeros(7, 4)
    load_checkpoint(path, {"model": {"0.weight": plain}})
    return torch.equal(plain, state["0.weight"].full_tensor())


def test_shards_load_as_a_whole_plain_tensor(ranks: RankPool, tmp_path: Path) -> None:
    ranks(2, save, tmp_path, "fsdp", "AdamW")
    assert ranks(2, _whole_and_part, tmp_path) == [True, True]


def _save_on_a_full_disk(folder: str) -> str:
    """A file that grows beyond the limit gets EFBIG, as one on a full disk gets ENOSPC."""
    large = DTensor.from_local(torch.zeros(50_000), init_device_mesh("cpu", (dist.get_world_size(),)))
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    try:
        save_checkpoint(Path(folder), 2, {"weight": large}, keep=2)
    except OSError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    return "saved"


def test_a_full_disk_is_an_os_error_on_every_rank_and_what_was_saved_stays(
    ranks: RankPool, tmp_path: Path
) -> None:
    before = save_checkpoint(tmp_path, 1, {"weight": torch.ones(3)}, keep=2)
    for world in (1, 2):
        first, *others = ranks(world, _save_on_a_full_disk, str(tmp_path))
        assert "File too large" in first or "could not be finished" in first
        assert all(other == first for other in others)
        assert newest_checkpoint(tmp_path) == before
    assert load_checkpoint(before, {"weight": torch.zeros(3)})["weight"].tolist() == [1, 1, 1]
