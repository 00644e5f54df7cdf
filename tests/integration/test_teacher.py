"""A task of the user's own that is taught by an average, through the command line."""

from pathlib import Path

import pytest

from tests.integration.commands import Warm, importable_here, records
from tests.makers import TINY_GPT

TASK = """
from torch.nn import functional as F
from trainer.tasks.language_modeling import LanguageModeling

class Distilled(LanguageModeling):
    def __init__(self, teacher: str = "0.9", **args):
        super().__init__(**args)
        self.teacher = teacher

    def losses(self, model, batch, random, averages):
        losses = super().losses(model, batch, random)
        tokens = batch["tokens"][:, :-1]
        answer, target = model(tokens), averages[self.teacher](tokens)
        return losses + (answer - target).float().square().mean((1, 2))
"""
OWN = ("task._target_=my_task.Distilled", "ema=bank", "ema.decays=[0.9,0.5]", "trainer.steps=4")
SHORT = ("trainer.log_every=1", "trainer.eval_every=4", "seed=3")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_task.py").write_text(TASK)
    return tmp_path


def losses(path: Path) -> list[float]:
    return [record["train/loss"] for record in records(path) if "train/loss" in record]


def test_a_run_with_a_teacher_resumes_bit_for_bit_and_is_the_same_on_more_ranks(
    folder: Path, warm: Warm
) -> None:
    warm(*TINY_GPT, *OWN, *SHORT, "run_dir=whole", cwd=folder, within=importable_here)
    warm(*TINY_GPT, *OWN, *SHORT, "run_dir=cut", "trainer.steps=2", cwd=folder, within=importable_here)
    warm("resume=cut", "trainer.steps=4", "allow_targets=[my_task.]", cwd=folder, within=importable_here)
    assert losses(folder / "cut") == losses(folder / "whole")
    for sharding in ("ddp", "fsdp"):
        options = ("sharding.activation_checkpointing=true", f"sharding={sharding}", f"run_dir={sharding}")
        warm(*TINY_GPT, *OWN, *SHORT, *options, ranks=2, cwd=folder, within=importable_here)
        assert losses(folder / sharding) == pytest.approx(losses(folder / "whole"), abs=1e-5)


def test_a_task_that_takes_averages_is_refused_where_there_is_none(folder: Path, warm: Warm) -> None:
    base = (*TINY_GPT, "task._target_=my_task.Distilled", "trainer.steps=1", "run_dir=run")
    line = warm(*base, "ema=off", cwd=folder, within=importable_here, code=2)
    assert "error: ema: Distilled.losses takes averages, and the run keeps none" in line
    line = warm(*base, "ema.decay=0.99", cwd=folder, within=importable_here, code=2)
    assert "error: task: expected an average of the run, one of 0.99, got '0.9'" in line
    assert not (folder / "run").exists()


def test_the_experiments_with_a_teacher_train(tmp_path: Path, warm: Warm) -> None:
    for name, metric in (("mean_teacher", "accuracy"), ("byol", "probe_accuracy")):
        run_dir = tmp_path / name
        warm(f"experiment={name}", "trainer.steps=20", "logger=none", f"run_dir={run_dir}", cwd=tmp_path)
        last = records(run_dir)[-1]
        averages = [key for key in last if key.startswith("eval/ema/") and key.endswith(f"/{metric}")]
        assert len(averages) == 1 and 0 < last[averages[0]] < 1 and 0 < last[f"eval/live/{metric}"] < 1
