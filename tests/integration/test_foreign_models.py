"""Models of transformers and diffusers, trained sharded through overrides alone, and exported for `from_pretrained`.

What an export must compute is computed here with the average swapped into the model that the checkpoint is loaded into.
"""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ema import EMABank, EMAConfig
from launch.export import main
from tests.integration.commands import TIMEOUT_S, Warm, last, records
from tests.makers import TINY_GPT
from trainer.checkpoint.store import newest_checkpoint
from trainer.checkpoint.training_state import load_training_state

TOLERANCE = 1e-6
"""Two processes lay the same weights out at other addresses, and a kernel may sum in another order."""
SHORT = ("trainer.steps=6", "trainer.log_every=1", "ema.decay=0.5", "sharding=fsdp", "run_dir=run")


def test_a_transformers_causal_lm_under_fsdp(tmp_path: Path, warm: Warm) -> None:
    pytest.importorskip("transformers", reason="the test extra is not installed")
    overrides = [override for override in TINY_GPT if not override.startswith("model.")]
    warm(
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

    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 256, "n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}
    tokens = torch.arange(64).view(2, 32)
    expected = from_average(
        GPT2LMHeadModel(GPT2Config(**sizes)), tmp_path / "run", lambda model: model(tokens).logits
    )
    assert (
        main([str(tmp_path / "run"), "weights=ema", f"out={tmp_path / 'gpt2'}/", "max_shard_size=100KB"]) == 0
    )
    assert {"config.json", "generation_config.json", "model.safetensors.index.json"} <= names(
        tmp_path / "gpt2"
    )
    found = in_a_process_without_this_project(
        tmp_path,
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('gpt2/').eval()\n"
        "assert model.lm_head.weight is model.transformer.wte.weight\n"
        "result = model(torch.arange(64).view(2, 32)).logits\n",
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_a_diffusers_unet_under_fsdp(tmp_path: Path, warm: Warm) -> None:
    pytest.importorskip("diffusers", reason="the test extra is not installed")
    warm(
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
        "+optimizer.args.foreach=true",
        "logger=none",
        *SHORT,
        cwd=tmp_path,
        ranks=2,
        report=True,
    )
    check(tmp_path / "run")
    assert (tmp_path / "run" / "report" / "samples.png").stat().st_size > 0

    from diffusers import UNet2DModel

    images = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    made = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    expected = from_average(made, tmp_path / "run", lambda model: model(images, 3).sample)
    assert main([str(tmp_path / "run"), "weights=ema/0.5", f"out={tmp_path / 'unet'}"]) == 0
    assert names(tmp_path / "unet") == {"config.json", "diffusion_pytorch_model.safetensors"}
    found = in_a_process_without_this_project(
        tmp_path,
        "from diffusers import UNet2DModel\n"
        "model = UNet2DModel.from_pretrained('unet').eval()\n"
        "result = model(torch.linspace(-1, 1, 64).view(1, 1, 8, 8), 3).sample\n",
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def check(run_dir: Path) -> None:
    losses = [record["train/loss"] for record in records(run_dir)]
    assert losses[-1] < losses[0]
    live, average = last(run_dir, ["eval/live/loss", "eval/ema/0.5/loss"])
    assert live != average
    assert last(run_dir, ["ema/0.5/rel_l2"])[0] > 0


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@torch.no_grad()
def from_average(model: nn.Module, run_dir: Path, compute: Callable[[nn.Module], Tensor]) -> Tensor:
    """What a model computes with the average `0.5` of a run swapped in; with the live weights it is something else."""
    bank = EMABank(model, {"0.5": EMAConfig(decay=0.5, batch_size=8)})
    checkpoint = newest_checkpoint(run_dir / "checkpoints")
    assert checkpoint is not None
    optimizer = torch.optim.AdamW(model.parameters())
    averages = {"ema": {"0.5": bank["0.5"].state_dict()}}
    loaded = load_training_state(checkpoint, model, optimizer, averages)
    bank["0.5"].load_state_dict(loaded["ema"]["0.5"])
    model.eval()
    live = compute(model)
    with bank["0.5"].swapped_into(model):
        averaged = compute(model)
    assert (live - averaged).abs().max() > 100 * TOLERANCE
    return averaged


def in_a_process_without_this_project(folder: Path, code: str) -> Tensor:
    """What Python code leaves in `result`, run where none of our packages can be or was imported."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, torch\ntorch.set_num_threads(1)\n"
            f"with torch.no_grad():\n{textwrap.indent(code, '    ')}"
            "torch.save(result, 'result.pt')\n"
            "assert not {'conf', 'ema', 'launch', 'models', 'trainer', 'tests'} & set(sys.modules)\n",
        ],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: Tensor = torch.load(folder / "result.pt")
    return result
