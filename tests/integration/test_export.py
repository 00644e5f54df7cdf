"""Weights exported by one process from checkpoints of 1, 2 and 4 ranks.

The reference is what torch's own conversion reads from the same checkpoint, and the loss that the run itself recorded
for the average at its last step.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from launch.export import main
from models.gpt import GPT
from tests.integration.commands import Warm, command, last, run_to_end
from tests.makers import TINY_GPT
from trainer.build import EVALUATION_SEED
from trainer.data.batches import eval_batches
from trainer.data.python_docs import python_docs
from trainer.tasks.language_modeling import LanguageModeling

RUN = (
    *TINY_GPT,
    "ema=bank",
    "ema.decays=[0.5,0.9]",
    "ema.mode=local_shard",
    "trainer.steps=6",
    "run_dir=run",
)


def plain() -> GPT:
    return GPT(vocab_size=256, context=32, n_layer=2, n_head=2, n_embd=32)


@torch.no_grad()
def evaluated(model: GPT) -> float:
    """Mean loss on the evaluation samples of the run."""
    splits, task = python_docs(context=32, max_bytes=200000), LanguageModeling()
    batches = eval_batches(splits.eval, 16, 16, 0, 1, EVALUATION_SEED)
    (losses,) = [task.losses(model.eval(), batch, None) for batch, _, _ in batches]
    return float(losses.mean())


@pytest.mark.parametrize(
    ("world", "more"),
    [(1, ()), (2, ("sharding.activation_checkpointing=true",)), (4, ())],
    ids=["1", "2", "4"],
)
def test_the_average_of_a_sharded_run_loads_into_the_plain_class(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    warm: Warm,
    world: int,
    more: tuple[str, ...],
) -> None:
    warm(*RUN, "sharding=fsdp", *more, cwd=tmp_path, ranks=world)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert len(list(checkpoint.glob("*.distcp"))) == world

    monkeypatch.chdir(tmp_path)
    assert main(["run", "weights=ema/0.9", "out=model.safetensors"]) == 0
    assert "model.safetensors (14 tensors, 131,712 bytes, float32)" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"run", "model.safetensors"}

    dcp_to_torch_save(checkpoint, tmp_path / "all.pt")
    stored = torch.load(tmp_path / "all.pt", weights_only=True)
    model = plain()
    load_model(model, tmp_path / "model.safetensors", strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[f"ema/0.9/{name}"]), name
        assert not torch.equal(tensor, stored[f"model/{name}"]), name

    live, other, average = last(
        tmp_path / "run", [f"eval/{weights}/loss" for weights in ("live", "ema/0.5", "ema/0.9")]
    )
    assert evaluated(model) == pytest.approx(average, abs=1e-5)
    assert min(abs(live - average), abs(other - average)) > 1e-3


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    words = command("nowhere", "weights=ema", "out=model.safetensors", module="launch.export")
    done = run_to_end(words, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"error: RUN_DIR: {tmp_path / 'nowhere'} is no directory; expected a run directory"
    ]
    assert list(tmp_path.iterdir()) == []
