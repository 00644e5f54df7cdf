"""A user's own sharding, in a file of the user's own: FSDP2 and tensor parallelism over a mesh of two dimensions."""

import sys
from pathlib import Path

import pytest

from tests.integration.commands import Warm, importable_here, last, records
from tests.makers import TINY_GPT
from tests.ranks import RankPool, threads_of_gloo

SHARDING = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from trainer.distributed.strategies import fully_shard_blocks


def tensor_parallel(model, processes, settings, ways: int = 1):
    shape = (processes.world_size // ways, ways)
    mesh = init_device_mesh(processes.device.type, shape, mesh_dim_names=("data", "tensor"))
    plan = {
        "attention.qkv": ColwiseParallel(output_layouts=Replicate()),
        "attention.out": RowwiseParallel(input_layouts=Replicate()),
        "mlp.up": ColwiseParallel(),
        "mlp.out": RowwiseParallel(),
    }
    for block in model.shard_blocks():
        parallelize_module(block, mesh["tensor"], plan)
    return fully_shard_blocks(model, mesh["data"], settings), mesh["data"]
"""
RUN = (
    *TINY_GPT,
    "ema=bank",
    "ema.decays=[0.5,0.9]",
    "trainer.steps=6",
    "trainer.log_every=1",
    "trainer.eval_every=3",
    "trainer.global_batch_size=4",
    "trainer.accumulate=2",  # four ranks could not each have samples of their own
    "trainer.max_grad_norm=0.5",  # below the norm of every step
    "run_dir=run",
)
OWN = ("sharding._target_=my_sharding.tensor_parallel", "+sharding.args.ways=2")
KEYS = ("train/loss", "train/grad_norm", "train/update_rel_l2", "ema/0.9/rel_l2")
EVALS = ("eval/live/loss", "eval/ema/0.5/loss", "eval/ema/0.9/loss")


def test_tensor_parallel_under_fsdp2_equals_one_process_and_leaves_no_threads(
    tmp_path: Path, warm: Warm, ranks: RankPool
) -> None:
    one, four = tmp_path / "one", tmp_path / "four"
    for name in ("one", "four"):
        (tmp_path / name).mkdir()
    (four / "my_sharding.py").write_text(SHARDING)
    warm(*RUN, cwd=one)
    warm(*RUN, *OWN, "trainer.steps=2", cwd=four, ranks=4, within=importable_here)
    warm("resume=run", "trainer.steps=4", "sharding=none", cwd=four)
    warm("resume=run", "trainer.steps=6", *OWN, cwd=four, ranks=4, within=importable_here)
    expected, found = records(one / "run"), records(four / "run")
    for key in KEYS:
        assert [r[key] for r in found] == pytest.approx([r[key] for r in expected], abs=1e-5), key
    assert last(four / "run", EVALS) == pytest.approx(last(one / "run", EVALS), abs=1e-5)
    if sys.platform == "linux":
        assert ranks(4, threads_of_gloo) == [1] * 4, "of the group that counts them, and of no earlier one"
