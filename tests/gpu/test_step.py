"""What only a GPU can show of a training step: it never waits, and a non-finite step is skipped on the device.

Without a card the same runs are made on the CPU, which shows that they can be made.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.gpu.tasks import forbid_waiting, no_waiting
from trainer.config.compose import compose
from trainer.optimizers import step_unless
from trainer.run import run

STEPS = 12
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPT = (
    "experiment=quickstart",
    "model.n_layer=2",
    "model.n_embd=64",
    "data.max_bytes=200000",
    "trainer.global_batch_size=8",
    "trainer.eval_samples=16",
    f"trainer.device={DEVICE}",
    "logger=none",
    f"trainer.steps={STEPS}",
    f"trainer.log_every={STEPS}",
    "trainer.save_every=0",
    "schedule.warmup_steps=0",
    "ema.decays=[0.9,0.99]",
    "optimizer.args.fused=true",
)
BF16 = ("sharding.param_dtype=bf16", "sharding.reduce_dtype=fp32")
COMPILED = pytest.mark.skipif(DEVICE == "cpu", reason="inductor's kernels for a GPU need one")


def train(run_dir: Path, *overrides: str) -> list[dict[str, float]]:
    """Train in this process; returns the records."""
    try:
        assert run(*compose([*GPT, f"run_dir={run_dir}", *overrides])) == 0
    finally:
        forbid_waiting(False)
    return records(run_dir)


def records(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), id="none"),
        pytest.param(BF16, id="bf16"),
        pytest.param(("sharding=ddp",), id="ddp"),
        pytest.param(("sharding=fsdp", *BF16), id="fsdp-bf16"),
        pytest.param(("sharding=fsdp", "ema.overlap=true"), id="fsdp-overlap"),
        pytest.param(("sharding=fsdp", "ema.device=cpu"), id="fsdp-offload"),
        pytest.param(("trainer.accumulate=2", "sharding.activation_checkpointing=true"), id="accumulate"),
        pytest.param(
            ("sharding=fsdp", *BF16, "sharding.compile=true"), id="fsdp-bf16-compiled", marks=COMPILED
        ),
    ],
)
def test_a_step_that_is_not_logged_never_waits_for_the_device(
    overrides: Sequence[str], tmp_path: Path
) -> None:
    """With DDP and FSDP2 this is also NCCL with one rank."""
    last = train(tmp_path / "run", "task._target_=tests.gpu.tasks.Watched", *overrides)[-1]
    assert last["train/step"] == STEPS
    assert last["train/skipped_steps"] == 0
    assert last["eval/ema/0.9/loss"] < last["eval/ema/0.99/loss"]  # it learns: the older average is behind


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_a_step_with_a_non_finite_gradient_is_skipped(sharding: str, tmp_path: Path) -> None:
    last = train(tmp_path / "run", "task._target_=tests.gpu.tasks.Faulty", f"sharding={sharding}")[-1]
    assert last["train/skipped_steps"] == 1
    assert last["eval/ema/0.9/loss"] < 5.6  # ln 256 = 5.55: finite, and it learns


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_a_fused_optimizer_decides_on_the_device_whether_to_step(name: str) -> None:
    weight = nn.Parameter(torch.ones(1000, device=DEVICE))
    weight.grad = torch.ones_like(weight)
    more = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)([weight], lr=0.1, fused=True, **more)
    flag = torch.ones((), dtype=torch.bool, device=DEVICE)
    step_unless(optimizer, flag)
    before = copy.deepcopy([weight.detach(), *optimizer.state[weight].values()])
    with no_waiting():
        step_unless(optimizer, ~flag)
    torch.testing.assert_close([weight.detach(), *optimizer.state[weight].values()], before, rtol=0, atol=0)
    with no_waiting():
        step_unless(optimizer, flag)
    assert (weight < before[0]).all()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The records of a run in float32, not compiled."""
    return train(tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        pytest.param(("sharding.compile=true",), 1e-3, id="compiled", marks=COMPILED),
        pytest.param(("sharding=fsdp", *BF16), 2e-2, id="bf16"),
        pytest.param(("sharding=fsdp", "ema.overlap=true"), 1e-3, id="overlap"),
        pytest.param(("sharding=fsdp", "ema.device=cpu"), 1e-3, id="offload"),
    ],
)
def test_the_losses_are_those_of_a_plain_run(
    overrides: Sequence[str], tolerance: float, plain: list[dict[str, float]], tmp_path: Path
) -> None:
    found = train(tmp_path / "run", *overrides)
    for key in ("train/loss", "eval/live/loss", "eval/ema/0.9/loss", "eval/ema/0.99/loss"):
        assert found[-1][key] == pytest.approx(plain[-1][key], rel=tolerance), key


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    plain: list[dict[str, float]], tmp_path: Path
) -> None:
    more = ("sharding=fsdp", "ema.device=cpu")
    train(tmp_path / "run", *more, f"trainer.steps={STEPS // 2}")
    assert run(*compose([f"resume={tmp_path / 'run'}", f"trainer.steps={STEPS}"])) == 0
    for key in ("train/loss", "eval/live/loss", "eval/ema/0.99/loss"):
        assert records(tmp_path / "run")[-1][key] == pytest.approx(plain[-1][key], rel=1e-3), key
