"""Runs that begin with the whole state of another run: `fork=RUN_DIR[@STEP]`."""

import json
import shutil
from pathlib import Path

import pytest

from launch.export import main as export
from launch.sweeps.expand import expand
from tests.integration.commands import (
    Warm,
    assert_equal_runs,
    deterministic,
    importable_here,
    records,
    saved,
)
from tests.makers import TINY_GPT
from trainer.rundir.directory import RunDir
from trainer.weights.fork import open_fork
from trainer.weights.safetensors_files import SafetensorsFiles

RUN = (*TINY_GPT, "ema.decays=[0.5,0.99]", "trainer.log_every=1", "trainer.eval_every=4")
OTHER = ("schedule=wsd", "schedule.warmup_steps=0", "optimizer.args.weight_decay=0.2")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    """A folder with a run of 8 steps, saved at 4 and 8."""
    folder = tmp_path_factory.mktemp("source")
    warm(*RUN, "trainer.steps=8", "trainer.save_every=4", "optimizer.lr=0.01", "run_dir=base", cwd=folder)
    return folder


@pytest.mark.parametrize(("world", "sharding"), [(1, ()), (2, ("sharding=fsdp",))], ids=["alone", "fsdp2"])
def test_a_fork_does_what_the_run_itself_would_do_under_these_settings(
    source: Path, tmp_path: Path, warm: Warm, world: int, sharding: tuple[str, ...]
) -> None:
    shutil.copytree(source / "base", tmp_path / "continued")
    shutil.rmtree(tmp_path / "continued" / "checkpoints" / "step-00000008")
    warm("resume=continued", *OTHER, *sharding, "trainer.steps=10", cwd=tmp_path, ranks=world)
    before = (source / "base" / "metrics.jsonl").read_bytes()
    fork = f"fork={source / 'base'}@4"
    printed = warm(fork, *OTHER, *sharding, "trainer.steps=10", "run_dir=fork", cwd=tmp_path, ranks=world)
    assert f"forks {source / 'base'} at step 4" in printed and "continues from" not in printed
    own, whole = records(tmp_path / "fork"), records(tmp_path / "continued")
    assert [one["train/step"] for one in own] == [5, 6, 7, 8, 9, 10]
    assert [deterministic(one) for one in own] == [deterministic(one) for one in whole[4:]]
    mine, theirs = saved(tmp_path / "fork"), saved(tmp_path / "continued")
    assert mine[0].keys() == theirs[0].keys()
    assert all(mine[0][name].equal(theirs[0][name]) for name in mine[0])
    assert (source / "base" / "metrics.jsonl").read_bytes() == before


def test_a_fork_that_was_killed_before_its_first_checkpoint_begins_again_at_the_same_step(
    source: Path, tmp_path: Path, warm: Warm
) -> None:
    shutil.copytree(source / "base", tmp_path / "base")
    newest = tmp_path / "base" / "checkpoints" / "step-00000008"
    newest.rename(tmp_path / "later")
    warm("fork=base", "trainer.steps=10", "run_dir=whole", cwd=tmp_path)
    warm("fork=base", "trainer.steps=10", "run_dir=killed", cwd=tmp_path)
    shutil.rmtree(tmp_path / "killed" / "checkpoints")
    (tmp_path / "killed" / "metrics.jsonl").unlink()
    (tmp_path / "killed" / "pairs.jsonl").unlink()
    (tmp_path / "later").rename(newest)  # the other run has gone on meanwhile
    marker = tmp_path / "base" / "checkpoints" / "step-00000004" / "COMMIT.json"
    written = marker.read_text()
    marker.write_text(written + " ")  # as if another run had this path and this step
    (line,) = warm("resume=killed", cwd=tmp_path, code=2).splitlines()
    assert "error: fork: " in line and "is of another run than the one from which this run began" in line
    marker.write_text(written)
    warm("resume=killed", cwd=tmp_path)
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")
    # A run with a checkpoint of its own needs the other run no more, and cannot begin elsewhere.
    shutil.rmtree(tmp_path / "base")
    warm("resume=killed", "trainer.steps=11", cwd=tmp_path)
    printed = warm("resume=killed", "fork=whole", "trainer.steps=12", cwd=tmp_path, code=2)
    assert "error: fork: " in printed and "start a new run" in printed


def test_only_the_same_fork_begins_again_at_the_recorded_step(source: Path) -> None:
    """A run without a checkpoint may be resumed with another `fork=`, whose own step counts."""
    text = str(source / "base")
    recorded = {"source": text, "step": 4}
    assert open_fork(text, 10, recorded).facts["step"] == 4
    assert open_fork(text, 10, {**recorded, "source": "another"}).facts["step"] == 8
    assert open_fork(f"{text}@8", 10, recorded).facts["step"] == 8


def test_the_origin_is_recorded_and_exported(source: Path, tmp_path: Path, warm: Warm) -> None:
    warm(f"fork={source / 'base'}", "trainer.steps=9", "run_dir=fork", cwd=tmp_path)
    facts = RunDir.open(tmp_path / "fork").meta["fork"]
    assert (facts["path"], facts["step"]) == (str(source / "base"), 8)
    assert export([str(tmp_path / "fork"), "weights=live", f"out={tmp_path / 'w.safetensors'}"]) == 0
    header = SafetensorsFiles(tmp_path / "w.safetensors")
    assert header.tensors
    assert json.dumps(facts["step"]) in (tmp_path / "w.safetensors").read_bytes()[:4000].decode("latin1")


def test_a_sweep_forks_one_run_under_several_settings(source: Path) -> None:
    fork = f"fork={source / 'base'}@4"
    plan = expand(["-m", fork, "schedule=wsd,constant", "optimizer.lr=0.001,0.002", "launch.slots=1"])
    chosen = [(run.config.schedule.name, run.config.optimizer.lr) for run in plan.runs]
    assert chosen == [("wsd", 0.001), ("wsd", 0.002), ("constant", 0.001), ("constant", 0.002)]
    for run in plan.runs:  # all else is as in the other run
        assert (run.config.fork, run.config.trainer.steps, run.config.ema.decays) == (
            fork[5:],
            8,
            [0.5, 0.99],
        )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fork=nothing"], "fork: {}/nothing is no directory"),
        (
            ["fork=base@5"],
            "fork: step: {}/base has no checkpoint of step 5; checkpoints exist for steps 4, 8",
        ),
        (
            ["fork=base"],
            "trainer.steps: expected more than the 8 steps done at base, which fork= names, got 8",
        ),
        (["fork=base", "experiment=quickstart"], "experiment: fork= keeps the experiment of the run"),
        (["fork=base", "init_from=base"], "fork: begins with the weights of the other run; remove init_from"),
        (["fork=base", "trainer.steps=9", "model.n_embd=64"], "model.n_embd: expected 32, got 64"),
    ],
)
def test_bad_input_is_one_line_and_makes_nothing(
    source: Path, warm: Warm, arguments: list[str], expected: str
) -> None:
    there = sorted(source.iterdir())
    (line,) = warm(*arguments, cwd=source, code=2).splitlines()
    assert line.startswith("error: ") and expected.format(source) in line
    assert sorted(source.iterdir()) == there


def test_a_fork_whose_first_step_fails_leaves_no_directory(source: Path, tmp_path: Path, warm: Warm) -> None:
    (tmp_path / "mine.py").write_text("def factor(step, steps):\n    return 1 / (step - 5) ** 2\n")
    own = ("schedule._target_=mine.factor", "schedule.warmup_steps=0", "allow_targets=[mine.]")
    fork = (f"fork={source / 'base'}@4", "trainer.steps=10", "run_dir=fork")
    printed = warm(*fork, *own, cwd=tmp_path, code=2, within=importable_here)
    assert "error: schedule: mine.factor: ZeroDivisionError" in printed
    assert not (tmp_path / "fork").exists()
