"""What only a GPU can show of a training step: it never waits, and a non-finite step is skipped on the device."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from trainer.config.compose import compose
from trainer.run import run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STEPS = 12
GPT = (
    "experiment=quickstart",
    "model.n_layer=2",
    "model.n_embd=64",
    "data.max_bytes=200000",
    "trainer.global_batch_size=8",
    "trainer.eval_samples=16",
    "trainer.device=cuda",
    "logger=none",
    f"trainer.steps={STEPS}",
    "trainer.save_every=0",
    "schedule.warmup_steps=0",
    "ema.decays=[0.9,0.99]",
    "optimizer.args.fused=true",
)

TASK = """
import torch
from trainer.tasks.language_modeling import LanguageModeling

class Counting(LanguageModeling):
    steps = 0
    def losses(self, model, batch, random):
        self.steps += model.training
        return super().losses(model, batch, random)

class Watched(Counting):
    '''Forbids to wait for the device in some steps, none of which is logged.'''
    def losses(self, model, batch, random):
        if model.training:
            torch.cuda.set_sync_debug_mode("error" if 4 <= self.steps <= 8 else "default")
        return super().losses(model, batch, random)

class Faulty(Counting):
    '''The loss of one step is infinite.'''
    def losses(self, model, batch, random):
        factor = float("inf") if model.training and self.steps == 5 else 1.0
        return super().losses(model, batch, random) * factor
"""


def train(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> list[dict[str, float]]:
    """Train in this process with the tasks above; returns the records."""
    (folder / "gpu_tasks.py").write_text(TASK)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    try:
        assert run(*compose([*GPT, "run_dir=run", *overrides])) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
        sys.modules.pop("gpu_tasks", None)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("sharding=fsdp",),
        ("sharding=ddp",),
        ("sharding=fsdp", "sharding.param_dtype=bf16", "sharding.reduce_dtype=fp32"),
        ("trainer.accumulate=2", "sharding.activation_checkpointing=true"),
    ],
    ids=["none", "fsdp", "ddp", "fsdp-bf16", "accumulate"],
)
def test_a_step_that_is_not_logged_never_waits_for_the_device(
    overrides: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With FSDP2 and DDP this is also NCCL with one rank."""
    records = train(
        tmp_path, monkeypatch, "task._target_=gpu_tasks.Watched", f"trainer.log_every={STEPS}", *overrides
    )
    assert records[-1]["train/step"] == STEPS


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_a_fused_step_with_a_non_finite_gradient_is_skipped_on_the_device(
    sharding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("task._target_=gpu_tasks.Faulty", "trainer.log_every=1", f"sharding={sharding}")
    records = train(tmp_path, monkeypatch, *overrides)
    assert records[-1]["train/skipped_steps"] == 1
    assert records[-1]["eval/ema/0.9/loss"] < 5.6  # ln 256 = 5.55: finite, and it learns


def test_blocks_compiled_by_inductor_train_as_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = []
    for name, overrides in (("eager", ()), ("compiled", ("sharding.compile=true",))):
        folder = tmp_path / name
        folder.mkdir()
        records = train(folder, monkeypatch, "trainer.log_every=1", *overrides)
        last.append([records[-1][key] for key in ("eval/live/loss", "eval/ema/0.9/loss")])
    assert last[0] == pytest.approx(last[1], rel=1e-3)
