"""A command that names an existing sweep adds the runs that it lacks, and starts only these."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launch import __main__ as launch
from launch import retry
from launch.sweeps.backends.local import Local
from launch.sweeps.config import LaunchConfig
from launch.sweeps.directory import Job, Sweep
from launch.sweeps.expand import expand
from launch.sweeps.growth import add_missing
from tests.makers import refusal_of
from tests.sweeps import put
from trainer.config.frozen import thaw

STARTED: list[str] = []


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: Local, sweep: Sweep, jobs: Sequence[Job], allowed: Sequence[str]) -> bool:
        STARTED.extend(job.run_dir for job in jobs)
        return True

    STARTED.clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Local, "start", start)


def sweep(*arguments: str) -> int:
    return launch.main(["-m", "trainer.steps=10", "sweep_dir=mine", "trainer.device=cpu", *arguments])


def test_what_is_missing_is_added_and_started(capsys: pytest.CaptureFixture[str]) -> None:
    sweep("seed=0,1")
    STARTED.clear()
    sweep("seed=0,1,2", "optimizer.lr=1e-3")  # the default, but typed: the same configuration
    assert STARTED == ["2_seed_2_lr_0.001"]
    assert f"sweep: {Path('mine').absolute()} (3 runs, 1 of them new)" in capsys.readouterr().out
    STARTED.clear()
    sweep("seed=1", "optimizer.lr=1e-3,2e-3")
    assert STARTED == ["3_seed_1_lr_0.002"]
    STARTED.clear()
    sweep("seed=0")
    assert STARTED == [] and "(4 runs, 0 of them new)" in capsys.readouterr().out
    record = Sweep.open("mine")
    assert [job.number for job in record.jobs] == [0, 1, 2, 3]
    assert all(record.run_dir(job).is_dir() for job in record.jobs)


def test_a_run_without_what_was_typed_for_all_others_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["sweep_dir=mine", "trainer.device=cpu"]
    launch.main(["-m", *shared, "experiment=digits_noise", "trainer.steps=10", "seed=0,1"])
    before = sorted(Path("mine").rglob("*"))
    here = f"expected here too, as typed for every run of {Path('mine').absolute()} (the last:"
    for words, expected in (
        ([], f"experiment, trainer.steps: {here} experiment=digits_noise trainer.steps=10)"),
        (["seed=2", "trainer.steps=20"], f"experiment: {here} experiment=digits_noise)"),
        (["seed=2", "experiment=digits_flow"], f"trainer.steps: {here} trainer.steps=10)"),
    ):
        assert launch.main(["-m", *shared, *words]) == 2
        assert capsys.readouterr().err.endswith(f"error: {expected}\n")
    assert sorted(Path("mine").rglob("*")) == before
    STARTED.clear()
    launch.main(
        ["-m", *shared, "experiment=digits_flow", "trainer.steps=20"]
    )  # the default seed is that of a run
    assert STARTED == ["2_experiment_digits_flow_steps_20"]


@pytest.mark.parametrize(
    ("default", "key"),
    [
        ("optimizer=adamw", "optimizer.lr=0.1,0.2"),
        ("ema=warmup", "ema.decay=0.1,0.2"),
        ("schedule=constant", "schedule.warmup_steps=1,2"),
    ],
)
def test_a_choice_that_is_the_default_need_not_be_typed_again(default: str, key: str) -> None:
    sweep(default, key)
    STARTED.clear()
    assert sweep(key.replace("2", "3")) in (0, 75)
    assert len(STARTED) == 1


@pytest.mark.parametrize(
    ("words", "key", "last"),
    [
        (["optimizer=sgd", "optimizer.lr=0.1"], "optimizer", " (the last: optimizer=sgd)"),
        (["ema.decays=[0.5,0.75]"], "ema.decays", " (the last: 'ema.decays=[0.5,0.75]')"),
        (["trainer.on_checkpoint=touch pwned"], "trainer.on_checkpoint", ""),
        (["allow_targets=[tests.]"], "allow_targets", ""),
    ],
)
def test_of_what_was_forgotten_only_words_that_run_no_code_are_printed(
    words: list[str], key: str, last: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(*words)
    assert sweep("seed=1", *words[1:]) == 2
    line = f"error: {key}: expected here too, as typed for every run of {Path('mine').absolute()}{last}\n"
    assert capsys.readouterr().err.endswith(line)
    STARTED.clear()
    sweep("seed=1", *words)
    assert STARTED


def test_a_decay_in_place_of_typed_decays_is_no_key_that_was_forgotten() -> None:
    sweep("ema.decays=[0.5,0.75]")
    STARTED.clear()
    sweep("ema.decay=0.9")
    assert STARTED


def test_the_commands_of_an_existing_sweep_are_printed_by_retry(capsys: pytest.CaptureFixture[str]) -> None:
    sweep("seed=0,1")
    capsys.readouterr()
    assert sweep("seed=0,1,2", "launch=print") == 2  # two of them exist, so their commands would be refused
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(
        "error: sweep_dir: mine is a sweep, and its runs would be"
    )
    assert retry.main(["mine", "launch=print"]) == 0
    assert capsys.readouterr().out.count("resume=") == 2


def test_a_sweep_whose_folder_was_renamed_keeps_its_runs() -> None:
    sweep("seed=0,1")
    os.rename("mine", "other")
    STARTED.clear()
    assert launch.main(["-m", "trainer.steps=10", "trainer.device=cpu", "sweep_dir=other", "seed=0,1,2"]) in (
        0,
        75,
    )
    assert STARTED == ["2_seed_2"]
    groups = {thaw(path.read_text()).logger.group for path in Path("other").glob("*/config.yaml")}
    assert groups == {"mine"}


def test_a_run_whose_directory_is_missing_is_named_by_what_adds_or_retries_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sweep("seed=0,1")
    shutil.rmtree("mine/0_seed_0")
    before = sorted(Path("mine").rglob("*"))
    for command in (lambda: sweep("seed=2"), lambda: retry.main(["mine"])):
        capsys.readouterr()
        assert command() == 2
        *_, error = capsys.readouterr().err.splitlines()
        assert error.startswith("error: ") and "0_seed_0/config.yaml is missing: expected" in error
    assert sorted(Path("mine").rglob("*")) == before


def test_a_sweep_of_another_working_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep("seed=0")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert launch.main(["-m", "seed=1", "sweep_dir=../mine"]) == 2
    assert "was started in" in capsys.readouterr().err
    assert len(Sweep.open("../mine").jobs) == 1


def test_a_folder_that_is_no_sweep_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    assert sweep("seed=0") == 2
    assert "exists already" in capsys.readouterr().err


def test_after_a_failure_the_sweep_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep("seed=0")
    found, before = Sweep.open("mine"), sorted(os.listdir("mine"))
    record = Path("mine/sweep.json").read_bytes()
    plan = expand(["-m", "trainer.steps=10", "trainer.device=cpu", "seed=1,2"])

    def full(self: Sweep, *_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Sweep, "save", full)
    with pytest.raises(OSError, match="No space"):
        add_missing(found, plan.runs, LaunchConfig())
    assert sorted(os.listdir("mine")) == before and Path("mine/sweep.json").read_bytes() == record
    assert len(found.jobs) == 1


def test_a_value_of_launch_that_is_wrong_changes_nothing() -> None:
    sweep("seed=0")
    plan = expand(["-m", "trainer.steps=10", "seed=1"])
    assert "launch.slots" in refusal_of(add_missing, Sweep.open("mine"), plan.runs, LaunchConfig(slots=0))


def test_another_backend_adds_nothing_while_runs_of_the_first_are_running() -> None:
    sweep("seed=0")
    found, record = Sweep.open("mine"), Path("mine/sweep.json").read_bytes()
    put(found, 0, host="another")
    plan = expand(["-m", "trainer.steps=10", "seed=0,1"])
    slurm = LaunchConfig(name="slurm")
    assert "launch: local still has 1 runs queued or running" in refusal_of(
        add_missing, found, plan.runs, slurm
    )
    assert Path("mine/sweep.json").read_bytes() == record
