"""Models of transformers and diffusers, trained sharded through overrides alone."""

from pathlib import Path

import pytest

from tests.integration.commands import TINY_GPT, last, records, trainer

SHORT = ("trainer.steps=6", "trainer.log_every=1", "ema.decay=0.5", "sharding=fsdp", "run_dir=run")


def test_a_transformers_causal_lm_under_fsdp(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the test extra is not installed")
    overrides = [override for override in TINY_GPT if not override.startswith("model.")]
    trainer(
        *overrides,
        "model=custom",
        "model._target_=transformers.GPT2LMHeadModel",
        "+model.config._target_=transformers.GPT2Config",
        "+model.config.vocab_size=256",
        "+model.config.n_positions=32",
        "+model.config.n_layer=2",
        "+model.config.n_head=2",
        "+model.config.n_embd=32",
        *SHORT,
        cwd=tmp_path,
        ranks=2,
    )
    check(tmp_path / "run")


def test_a_diffusers_unet_under_fsdp(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the test extra is not installed")
    trainer(
        "experiment=digits_flow",
        "task.class_conditional=false",
        "task.sample_count=4",
        "task.sample_steps=2",
        "model=custom",
        "model._target_=diffusers.UNet2DModel",
        "+model.sample_size=8",
        "+model.in_channels=1",
        "+model.out_channels=1",
        "+model.layers_per_block=1",
        "+model.block_out_channels=[8,16]",
        "+model.down_block_types=[DownBlock2D,DownBlock2D]",
        "+model.up_block_types=[UpBlock2D,UpBlock2D]",
        "+model.norm_num_groups=4",
        "ema=constant",
        "trainer.global_batch_size=8",
        "trainer.eval_samples=16",
        "trainer.num_threads=1",
        "logger=none",
        *SHORT,
        cwd=tmp_path,
        ranks=2,
    )
    check(tmp_path / "run")
    assert (tmp_path / "run" / "report" / "samples.png").stat().st_size > 0


def check(run_dir: Path) -> None:
    losses = [record["train/loss"] for record in records(run_dir)]
    assert losses[-1] < losses[0]
    live, average = last(run_dir, ["eval/live/loss", "eval/ema/0.5/loss"])
    assert live != average
    assert last(run_dir, ["ema/0.5/rel_l2"])[0] > 0
