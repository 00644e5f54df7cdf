"""`python -m launch.plan`: what it refuses, what it advises, and its figures where a formula gives them.

Sizes of a model come from its shapes, rings from the formulas of Patarasuk and Yuan (2009). Figures against real
processes are in `tests/integration/test_plan.py`.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from launch.plan import main, refuse_what_does_not_fit, remedy
from launch.planning.figures import GIB, Average, Held, Plan
from launch.planning.ledger import ring_crossing, sent_by_rank
from launch.planning.parts import checkpoint_bytes
from trainer.config.schema import Config, ShardingConfig, TrainerConfig
from trainer.config.validate import validate
from trainer.distributed.processes import Processes
from trainer.errors import ConfigError
from trainer.report.format import format_size

TINY = ("model.n_layer=3", "model.n_embd=64", "model.context=32", "data.context=32", "ema=off")
BLOCK = 12 * 64 * 64 + 2 * 64
"""Parameters of a block: qkv, out, up and down, and two norms."""
ROOT = 256 * 64 + 64


def planned(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    assert main([*arguments, f"out={tmp_path}"]) == 0
    plan: dict[str, Any] = json.loads((tmp_path / "plan.json").read_text())[0]
    assert f"world={plan['world']} on " in (tmp_path / "plan.md").read_text()
    return plan


def test_whole_blocks_count_at_the_peak_as_long_as_they_are_gathered(tmp_path: Path) -> None:
    overrides = (*TINY, "model.n_layer=8", "sharding=fsdp", "world=4")
    once = planned(tmp_path, *overrides)
    kept = planned(tmp_path, *overrides, "sharding.reshard_after_forward=false")
    assert once["most"] == kept["most"]
    assert once["most"]["parameters"] == 8 * BLOCK + ROOT  # 4 bytes each, over 4 ranks
    base = once["most"]["parameters"] + once["most"]["optimizer"]
    # When the backward begins all eight blocks and the root are whole; the last block's whole gradient is made first.
    assert kept["peak"] - base == pytest.approx(4 * (8 * BLOCK + ROOT + BLOCK), rel=0.02)
    # Else a block, the next one, and a whole gradient on its way; never half of the blocks beside the root.
    assert 4 * 3 * BLOCK < once["peak"] - base < 4 * (ROOT + 5 * BLOCK)


@pytest.mark.parametrize(("reshard", "gathers"), [("true", 2), ("false", 1)])
def test_what_travels_is_what_the_sharding_says(tmp_path: Path, reshard: str, gathers: int) -> None:
    overrides = (*TINY, "sharding=hsdp", "sharding.param_dtype=bf16", "sharding.reduce_dtype=fp32")
    plan = planned(
        tmp_path, *overrides, f"sharding.reshard_after_forward={reshard}", "world=8", "processes_per_node=4"
    )
    found = {(one["phase"], one["collective"]): one for one in plan["traffic"]}
    count = 3 * BLOCK + ROOT
    assert sum(one["collective"] == "all-gather" for one in plan["traffic"]) == gathers
    assert found["forward", "all-gather"]["payload"] == 2 * count
    # Shards in a node of four, replicas of two between nodes: (n-1)/n of the whole, and twice that for the quarter.
    assert found["forward", "all-gather"]["within"] == 2 * count * 3 / 4
    assert found["forward", "all-gather"]["between"] == 0
    assert found["backward", "reduce-scatter"]["within"] == 4 * count * 3 / 4
    # 8 bytes more: the gradients' norm, over the node.
    assert found["backward", "all-reduce"]["payload"] == 4 * count // 4 + 8
    assert found["backward", "all-reduce"]["between"] == 2 * (4 * count // 4) / 2


def test_a_ring_sends_all_but_its_own_part_and_leaves_the_node_once() -> None:
    assert [sent_by_rank(kind, 80, 4) for kind in ("all-gather", "reduce-scatter", "all-reduce")] == [
        60,
        60,
        120,
    ]
    assert sent_by_rank("all-reduce", 80, 1) == 0
    assert ring_crossing(list(range(64)), 8) == 1 / 8
    assert ring_crossing([0, 8, 16, 24], 8) == 1
    assert ring_crossing(list(range(8)), 8) == 0
    assert ring_crossing([0, 1, 2], 2) == 2 / 3


def test_a_checkpoint_holds_every_tensor_once_in_frames_of_its_own() -> None:
    one, two = torch.zeros(1000), torch.zeros(1000, dtype=torch.float64)
    frame = checkpoint_bytes({"a": one}) - 4000
    assert 500 < frame < 4000
    assert checkpoint_bytes({"a": one, "b": {"c": two, "d": "text"}}) == 12000 + 2 * frame


def test_sizes_have_three_digits_and_a_unit() -> None:
    assert [format_size(n) for n in (0, 999, 1024, 80 * GIB, 2.5 * GIB, 1000 * GIB)] == [
        "0 B",
        "999 B",
        "1.00 KiB",
        "80.0 GiB",
        "2.50 GiB",
        "0.98 TiB",
    ]


def plan_of(
    strategy: str, world: int, replicas: int, state: float, moment: float, *averages: Average
) -> Plan:
    """Sizes in GiB."""
    rank = Held(0, int(state * GIB), 0, 0, list(averages))
    peak = rank.state + rank.on_device + int(moment * GIB)
    return Plan(
        "run",
        strategy,
        world,
        replicas,
        8,
        1,
        "AdamW",
        rank,
        dataclasses.replace(rank, rank=1),
        peak,
        0,
        0,
        [],
    )


def average(whole: float, part: float, mode: str, on_host: bool = False) -> Average:
    return Average("0.9", mode, int(whole * GIB), int(part * GIB), on_host)


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (
            plan_of("fsdp", 8, 1, 40, 10, average(64, 8, "full_tensor")),
            "ema.mode=local_shard would need 58.0 GiB",
        ),
        (plan_of("hsdp", 8, 4, 100, 10), "sharding=fsdp would need about 35.0 GiB"),
        (plan_of("ddp", 8, 1, 100, 10), "sharding=fsdp would need about 22.5 GiB"),
        # 90 GiB on each of 8 are 720; 70 GiB are left beside what is gathered: 10.3 ranks, two nodes.
        (plan_of("fsdp", 8, 1, 90, 10), "sharding=fsdp would fit on about world=16"),
        (
            plan_of("hsdp", 16, 2, 700, 10, average(560, 70, "full_tensor")),
            "sharding=fsdp ema.mode=local_shard would fit on about world=88",
        ),
        (
            plan_of("fsdp", 8, 1, 1, 90),
            "sharding.reshard_after_forward=true or smaller blocks would gather less",
        ),
    ],
)
def test_the_nearest_thing_that_helps_is_named(plan: Plan, expected: str) -> None:
    trainer = TrainerConfig(global_batch_size=88 * 16)
    assert remedy(plan, 80 * GIB, trainer) == expected
    with pytest.raises(ConfigError, match=r"^memory_gib: .*, got 80 GiB; ") as refused:
        refuse_what_does_not_fit(plan, 80, trainer)
    assert str(refused.value).endswith(expected) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("batch", "accumulate", "expected"),
    [
        (512, 1, "world=16"),
        (512, 8, "world=16"),
        (24 * 5, 1, "world=24"),  # 16 does not divide it
        (64, 8, "world=16 trainer.accumulate=4"),
        (33, 1, "world=16, with a trainer.global_batch_size that is a multiple of 16"),
        (8, 1, "world=16, with a trainer.global_batch_size that is a multiple of 16"),
    ],
)
def test_ranks_that_are_recommended_can_run(batch: int, accumulate: int, expected: str) -> None:
    """10.3 ranks hold it, of 8 a node."""
    trainer = TrainerConfig(global_batch_size=batch, accumulate=accumulate)
    told = remedy(plan_of("fsdp", 8, 1, 90, 10), 80 * GIB, trainer)
    assert told == f"sharding=fsdp would fit on about {expected}"
    if "multiple" not in expected:
        words = dict(word.split("=") for word in expected.split())
        settings = dataclasses.replace(trainer, accumulate=int(words.get("trainer.accumulate", accumulate)))
        config = Config(trainer=settings, sharding=ShardingConfig(strategy="fsdp"))
        validate(config, int(words["world"]))


def test_a_part_of_one_node_is_recommended_where_no_whole_one_divides_the_batch() -> None:
    # 160 GiB, and 70 are left beside what is gathered: 2.3 ranks, of 8 a node.
    plan = plan_of("fsdp", 2, 1, 80, 10)
    assert remedy(plan, 80 * GIB, TrainerConfig(global_batch_size=6)).endswith("about world=3")
    assert remedy(plan, 80 * GIB, TrainerConfig(global_batch_size=4)).endswith("about world=4")


def test_averages_in_host_memory_are_not_on_the_device() -> None:
    elsewhere, here = (average(100, 100, "local_shard", on_host) for on_host in (True, False))
    refuse_what_does_not_fit(plan_of("fsdp", 8, 1, 70, 5, elsewhere), 80, TrainerConfig())
    with pytest.raises(ConfigError, match="100 GiB are averages"):
        refuse_what_does_not_fit(plan_of("fsdp", 8, 1, 70, 5, here), 80, TrainerConfig())


def test_what_does_not_fit_is_shown_and_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "world=2", "sharding=ddp", "memory_gib=0.001"]) == 2
    printed = capsys.readouterr()
    assert "device memory at its peak" in printed.out
    assert "Activations and the memory of the libraries are NOT counted" in printed.out
    assert printed.err.startswith("error: memory_gib: a rank of world=2 needs ")
    assert printed.err.count("\n") == 1 and "sharding=fsdp would" in printed.err


def test_several_worlds_are_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ("sharding=fsdp", "model.n_layer=1", "ema=constant")
    assert main([*overrides, "world=2,4,8", f"out={tmp_path}"]) == 0
    assert "comparison of numbers of ranks" in capsys.readouterr().out
    rows = [
        line.split("|")[1].strip() for line in (tmp_path / "plan.md").read_text().splitlines() if "iB" in line
    ]
    assert rows == ["2", "4", "8"]
    plans = json.loads((tmp_path / "plan.json").read_text())
    assert [plan["most"]["parameters"] * plan["world"] for plan in plans] == [
        plans[0]["num_parameters"] * 4
    ] * 3


@pytest.mark.parametrize("sharding", ["none", "ddp", "fsdp"])
def test_a_model_that_knows_nothing_of_us_is_planned(tmp_path: Path, sharding: str) -> None:
    model = ("model=custom", "model._target_=torch.nn.Transformer", "+model.d_model=64", "+model.nhead=2")
    small = ("+model.num_encoder_layers=2", "+model.num_decoder_layers=1", "+model.dim_feedforward=128")
    world = 1 if sharding == "none" else 2
    plan = planned(tmp_path, *model, *small, f"sharding={sharding}", f"world={world}")
    own = torch.nn.Transformer(64, 2, 2, 1, 128)
    whole = sum(parameter.nbytes for parameter in own.parameters())
    assert plan["most"]["parameters"] == pytest.approx(whole / (world if sharding == "fsdp" else 1), rel=0.01)


@pytest.mark.parametrize("sharding", ["none", "ddp", "fsdp"])
def test_adapters_are_planned_without_a_second_copy_of_the_frozen_model(
    tmp_path: Path, sharding: str
) -> None:
    pytest.importorskip("peft", reason="the extra is not installed")
    base = ("vocab_size=256", "context=32", "n_layer=2", "n_head=2", "n_embd=64")
    model = ("model=lora", "model.model._target_=models.gpt.GPT", *(f"+model.model.{size}" for size in base))
    world = 1 if sharding == "none" else 2
    adapters = ("model.peft_config.r=4", "model.peft_config.target_modules=[up]", "data.context=32")
    plan = planned(tmp_path, *model, *adapters, "ema=constant", f"sharding={sharding}", f"world={world}")
    trained = 4 * 2 * 4 * (64 + 256)
    (average,) = plan["most"]["averages"]
    assert (
        average["full_tensor"] == plan["most"]["gradients"] * (world if sharding == "fsdp" else 1) == trained
    )
    assert plan["num_parameters"] == 2 * BLOCK + ROOT + trained / 4


def share_samples(model: nn.Module, processes: Processes, settings: ShardingConfig) -> object:
    mesh = init_device_mesh("cpu", (processes.world_size // 2, 2), mesh_dim_names=("data", "copies"))
    return model, mesh["data"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["experiment=quickstart"],
            "world: expected numbers of processes, as in world=1 (no torchrun), world=64 or world=8,64, got none",
        ),
        (["world=0"], "world: expected numbers of processes"),
        (["world=8,"], "world: expected numbers of processes"),
        (["world=2", "memory_gib=much"], "memory_gib: expected a number of GiB above 0, got much"),
        (["world=2", "memory_gib=-1"], "memory_gib: expected a number of GiB above 0, got -1"),
        (
            ["world=2", "processes_per_node=0"],
            "processes_per_node: expected a whole number of at least 1, got 0",
        ),
        (["world=2", "out="], "out: expected a directory, got nothing"),
        (["world=2", "out=plan.JSON"], "out: expected a directory, got plan.JSON"),
        (["world=1", "out=/proc/x"], "out: /proc/x cannot be written: "),
        (["world=2", "sharding=fsdp", "ema.deca=0.9"], "ema.deca: unknown key; did you mean ema.decay?"),
        (["world=2", "out=report.d"], "sharding.strategy: 'none' is for one process and this run has 2"),
        (["world=3", "sharding=fsdp"], "trainer.global_batch_size: expected a multiple of 3"),
        (
            ["world=4,6", "sharding=hsdp", "sharding.replicate=4", "trainer.global_batch_size=24"],
            "sharding.replicate",
        ),
        (
            [*TINY, "world=4", f"sharding._target_={__name__}.share_samples"],
            "sharding._target_: cannot be planned",
        ),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and expected in printed.err


def test_no_argument_is_bad_input_and_help_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.count("\n  python -m launch.plan ") == 2


@pytest.mark.parametrize("arguments", [["--help"], ["world=64", "sharding=fsdp", "ema.decay=2"]])
def test_torch_is_not_imported_before_the_arguments_are_read(arguments: list[str]) -> None:
    code = (
        "import sys; from launch.plan import main; main(sys.argv[1:]); "
        "sys.exit(str({'torch', 'matplotlib', 'wandb'} & set(sys.modules)).replace('set()', '') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ddp_of_a_model_larger_than_this_machine_is_refused_not_allocated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    wide = ("model.n_embd=65536", "model.n_head=16", "model.n_layer=2", "ema=constant")
    assert main([*wide, "sharding=ddp", "world=8"]) == 2
    printed = capsys.readouterr()
    # Two blocks of 12 n^2 and 256 n: 0.375 TiB of float32 for weights, as much for gradients, twice for AdamW.
    assert "1.50 TiB are parameters, gradients and optimizer" in printed.err
    assert [line.split()[0] for line in printed.out.splitlines() if "all-" in line] == ["backward"]


def test_a_plan_counts_the_averages_that_a_bank_may_grow_by(tmp_path: Path) -> None:
    grows = ("ema=axis", "ema.axis=3", "ema.axis_grows=true", "trainer.steps=128")
    plan = planned(tmp_path, *TINY[:-1], *grows, "world=1")
    names = [one["name"] for one in plan["most"]["averages"]]
    assert names == ["horizon_2", "horizon_4", "horizon_8", "initial", "horizon_16", "horizon_32"]
