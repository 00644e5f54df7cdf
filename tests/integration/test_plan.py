"""What `python -m launch.plan` says against what real processes hold, send and write.

The measured numbers are those of a run built and stepped by the trainer on gloo processes: bytes of the tensors each
rank has, of what its collectives carry, and of the files of its checkpoint.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ema import ExponentialMovingAverage
from ema.state import COUNTERS, RULE
from launch.plan import main
from tests.integration.commands import Warm
from tests.makers import TINY_GPT
from tests.ranks import RankPool
from trainer.build import build, build_evaluated, make_run
from trainer.checkpoint.saving import Saver, Ways
from trainer.config.averages import settle_averages
from trainer.config.compose import compose, to_config
from trainer.distributed.processes import Processes
from trainer.loop.fit import train_step

SMALL_GPT = (*TINY_GPT, "model.n_embd=96", "trainer.log_every=1000", "trainer.global_batch_size=24")
UNEVEN = ("model.n_head=3", "model.n_embd=90", "model.vocab_size=259", "model.mlp_ratio=1.9")
"""Over 4 ranks rows of 23, 23, 23, 21 (norms) and 65, 65, 65, 64 (embedding)."""
CHECKPOINT_BOUND = 0.05
"""What is held and sent must be right to the byte; the index of a checkpoint is not planned."""


class Carried(TorchDispatchMode):
    """Bytes of the whole tensors of each collective that is called within."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = {"all-gather": 0, "reduce-scatter": 0, "all-reduce": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        match func.name():
            case "c10d::_allgather_base_":
                self.bytes["all-gather"] += args[0].nbytes
            case "_c10d_functional::all_gather_into_tensor":
                self.bytes["all-gather"] += out.nbytes
            case "c10d::_reduce_scatter_base_":
                self.bytes["reduce-scatter"] += args[1].nbytes
            case "c10d::allreduce_":
                self.bytes["all-reduce"] += sum(tensor.nbytes for tensor in args[0])
            case name:
                assert "c10d" not in name or name.endswith(("::wait_tensor", "::_wrap_tensor_autograd")), name
        return out


def local_bytes(tensors: Iterable[Any]) -> int:
    parts = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if isinstance(t, Tensor)]
    return sum(part.nbytes for part in parts)


def shadow_bytes(average: ExponentialMovingAverage) -> int:
    return local_bytes(tensor for key, tensor in average.state_dict().items() if key not in (COUNTERS, RULE))


def measure(overrides: list[str], folder: str) -> dict[str, Any]:
    """One rank of a real run after one step and one checkpoint."""
    config = to_config(compose(overrides)[0])
    processes = Processes(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    averages = settle_averages(config)
    parts = build(config, averages, build_evaluated(config, averages, processes, []), [])
    found: dict[str, Any] = {}
    parts.optimizer.register_step_pre_hook(
        lambda optimizer, *_: found.update(
            gradients=local_bytes(p.grad for group in optimizer.param_groups for p in group["params"])
        )
    )
    run = make_run(config, parts)
    with Carried() as carried:
        train_step(run, 1)
    run.step = 1
    Saver(Path(folder), Ways(print), keep=1).save(run)
    dist.barrier()
    return found | {
        "parameters": local_bytes(parts.network.module.parameters()),
        "optimizer": local_bytes(
            value for entry in parts.optimizer.state.values() for value in entry.values()
        ),
        "averages": {name: shadow_bytes(average) for name, average in run.bank.items()},
        "checkpoint": sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()),
        "carried": carried.bytes,
    }


def planned(overrides: list[str], world: int, out: Path, *more: str) -> Mapping[str, Any]:
    assert main([*overrides, f"world={world}", f"out={out}", *more]) == 0
    plan: dict[str, Any] = json.loads((out / "plan.json").read_text())[0]
    return plan


def carried(plan: Mapping[str, Any]) -> dict[str, int]:
    sums = {"all-gather": 0, "reduce-scatter": 0, "all-reduce": 0}
    for one in plan["traffic"]:
        sums[one["collective"]] += one["payload"]
    return sums


CASES = {
    "fsdp2": (2, ["sharding=fsdp"]),
    "fsdp2-bf16-kept-gathered-accumulated": (
        2,
        [
            "sharding=fsdp",
            "sharding.param_dtype=bf16",
            "sharding.reduce_dtype=fp32",
            "sharding.reshard_after_forward=false",
            "trainer.accumulate=2",
        ],
    ),
    "fsdp4-uneven": (4, ["sharding=fsdp", *UNEVEN]),
    "fsdp4-uneven-full-tensor": (4, ["sharding=fsdp", "ema.mode=full_tensor", *UNEVEN]),
    "hsdp-2x2": (4, ["sharding=hsdp", "optimizer=sgd"]),
    "ddp2": (2, ["sharding=ddp", "optimizer=any", "optimizer.name=Adadelta"]),
    "fsdp2-on-the-host": (2, ["sharding=fsdp", "ema=constant", "ema.device=cpu", "ema.dtype=float64"]),
}


@pytest.mark.parametrize("case", CASES)
def test_planned_and_measured_bytes_agree_on_every_rank(case: str, ranks: RankPool, tmp_path: Path) -> None:
    world, overrides = CASES[case]
    overrides = [*SMALL_GPT, "ema=bank", "ema.decays=[0.9,0.99]", *overrides]
    if "ema=constant" in overrides:
        overrides = [one for one in overrides if one not in ("ema=bank", "ema.decays=[0.9,0.99]")]
    measured = ranks(world, measure, overrides, str(tmp_path / "checkpoints"))
    plan = planned(overrides, world, tmp_path / "plan")
    for held, real in ((plan["most"], measured[0]), (plan["least"], measured[-1])):
        for what in ("parameters", "gradients", "optimizer"):
            assert held[what] == real[what], what
        assert {one["name"] for one in held["averages"]} == set(real["averages"])
        for one in held["averages"]:
            assert one[one["mode"]] == real["averages"][one["name"]]
    assert max(real["parameters"] for real in measured) == measured[0]["parameters"]
    assert (measured[0]["parameters"] > measured[-1]["parameters"]) == ("uneven" in case)
    assert plan["checkpoint"] == pytest.approx(measured[0]["checkpoint"], rel=CHECKPOINT_BOUND)
    assert all(carried(plan) == real["carried"] for real in measured)


def test_the_averages_of_full_tensor_are_gathered_once_for_all_and_local_shard_sends_nothing(
    tmp_path: Path,
) -> None:
    overrides = [*SMALL_GPT, "ema=bank", "ema.decays=[0.9,0.99]", "sharding=fsdp"]
    local = planned(overrides, 4, tmp_path)
    whole = planned([*overrides, "ema.mode=full_tensor"], 4, tmp_path)
    assert not [one for one in local["traffic"] if one["phase"] == "averages"]
    (gathered,) = [one for one in whole["traffic"] if one["phase"] == "averages"]
    assert gathered["payload"] == pytest.approx(4 * whole["num_parameters"], rel=0.01)
    # Two whole averages of float32 for two quarters of them; local ones have a scratch besides.
    assert whole["peak"] > local["peak"] + 4 * whole["num_parameters"]


@pytest.mark.slow
def test_4096_ranks_are_planned_without_data_or_processes(tmp_path: Path) -> None:
    overrides = ["experiment=gpt2_124m", "trainer.global_batch_size=4096", "trainer.accumulate=1"]
    plan = planned(overrides, 4096, tmp_path)
    assert plan["most"]["rank"] == 0 and plan["least"]["rank"] == 4095
    assert plan["least"]["parameters"] < plan["most"]["parameters"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_snapshots_of_a_run_are_planned_in_all_and_for_a_rank(
    tmp_path: Path, warm: Warm, dtype: str
) -> None:
    series = ("ema=posthoc", "ema.snapshots=3", f"ema.snapshot_dtype={dtype}")
    words = (*SMALL_GPT, *series, "trainer.steps=6", "sharding=fsdp")
    warm(*words, "run_dir=run", cwd=tmp_path, ranks=2)
    assert main([*words, "world=2", f"out={tmp_path}"]) == 0
    (plan,) = json.loads((tmp_path / "plan.json").read_text())
    files = [file for file in (tmp_path / "run/snapshots").glob("step-*/*.distcp")]
    assert len(files) == 2 * 4  # with the weights of step 0
    of_rank_0 = sum(file.stat().st_size for file in files if file.name.startswith("__0_"))
    assert plan["snapshots"] == pytest.approx(
        sum(file.stat().st_size for file in files), rel=CHECKPOINT_BOUND
    )
    assert plan["snapshots_of_rank"] == pytest.approx(of_rank_0, rel=CHECKPOINT_BOUND)
    assert "snapshots of the run, all ranks" in (tmp_path / "plan.md").read_text()
