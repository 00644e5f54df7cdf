"""A checkpoint that a thread writes has the state of its step, whatever the training does meanwhile. One process."""

import errno
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import nn

from tests.makers import loop_run
from trainer.checkpoint import saving, writing
from trainer.checkpoint.saving import Saver, Ways, state_of
from trainer.checkpoint.store import load_checkpoint, newest_checkpoint
from trainer.config.schema import OptimizerConfig, TrainerConfig
from trainer.errors import NotSaved
from trainer.loop.fit import Run, train_step
from trainer.seeding import StepRandom

pytestmark = pytest.mark.usefixtures("group")


class Squares:
    def losses(self, model: nn.Module, batch: dict, random: StepRandom) -> torch.Tensor:
        return model(batch["x"]).square().mean(1)


def make_run(module: nn.Module | None = None) -> Run:
    torch.manual_seed(0)
    module = module or nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    batches = ({"x": torch.randn(4, 3)} for _ in iter(int, 1))
    config = TrainerConfig(steps=99, global_batch_size=4, log_every=99, device="cpu")
    run = loop_run(config, module, Squares(), batches, OptimizerConfig(lr=0.1), decay=0.9)
    steps(run, 2)
    return run


def steps(run: Run, count: int) -> None:
    for _ in range(count):
        train_step(run, run.step + 1)
        run.step += 1


def tensors(state: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    found = {}
    for key, value in state.items():
        if isinstance(value, dict):
            found |= tensors(value, f"{prefix}{key}/")
        elif isinstance(value, torch.Tensor):
            found[f"{prefix}{key}"] = value.clone()
    return found


def saver(folder: Path, run: Run, warned: list[str] | None = None) -> Saver:
    found = Saver(folder, Ways([].append if warned is None else warned.append, background=True), keep=2)
    run.before_change = [found.before_change]
    return found


def test_the_training_goes_on_while_the_state_of_the_step_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, go_on, write = make_run(), Event(), saving.write
    monkeypatch.setattr(saving, "write", lambda *args: go_on.wait(20) and write(*args))
    expected = tensors(state_of(run))
    with saver(tmp_path / "checkpoints", run) as saves:
        saves.save(run, last=False)
        steps(run, 2)
        assert newest_checkpoint(tmp_path / "checkpoints") is None
        go_on.set()
    stored = newest_checkpoint(tmp_path / "checkpoints")
    assert stored is not None and stored.name == "step-00000002"
    loaded = tensors(load_checkpoint(stored, state_of(run)))
    assert loaded.keys() == expected.keys() and any("running_mean" in name for name in loaded)
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


def test_a_second_save_waits_for_the_first_and_old_ones_are_deleted(tmp_path: Path) -> None:
    run = make_run()
    with saver(tmp_path, run) as saves:
        for _ in range(4):
            saves.save(run, last=False)
            steps(run, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_a_save_that_fails_is_a_warning_and_the_last_one_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, warned = make_run(), list[str]()
    with saver(tmp_path, run, warned) as saves:
        saves.save(run, last=False)
        steps(run, 1)
        saves.settle()
        with monkeypatch.context() as patch:
            patch.setattr(writing.Writer, "write_data", full)
            saves.save(run, last=False)
            saves.settle()
            steps(run, 1)
            expected = (
                "warning: {}: step 3 cannot be written: No space left on device; the training goes on without"
            )
            assert [text.startswith(expected.format(tmp_path)) for text in warned] == [True]
            with pytest.raises(NotSaved, match="step 4 cannot be written: No space left on device"):
                saves.save(run, last=True)
        saves.save(run, last=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_state_that_changes_while_it_is_copied_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, go_on, saves = make_run(), Event(), Saver(tmp_path, Ways(print, background=True), keep=2)
    finish = saves._staging.finish
    monkeypatch.setattr(saves._staging, "finish", lambda: go_on.wait(20) and finish())
    with (
        pytest.raises(
            RuntimeError, match=r"exp_avg was changed before the optimizer step, while it was copied"
        ),
        saves,
    ):
        saves.save(run, last=False)
        for entry in run.optimizer.state.values():
            entry["exp_avg"].add_(1)  # what nothing but the optimizer step may do
        go_on.set()
    assert newest_checkpoint(tmp_path) is None
