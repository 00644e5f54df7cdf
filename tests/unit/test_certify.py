"""The command line of `launch.certify`, the settings of its short runs, and what a signal leaves behind."""

import math
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ema.config import EMAConfig
from launch.certify import HELP, main, parse
from launch.certifying.checks import Checks
from launch.certifying.impulse import deviation
from launch.certifying.rows import SHARDED, Row, skipped
from launch.certifying.running import RunFailed
from launch.certifying.settings import sharded, short, unsharded
from tests.makers import freeze, make_run_dir, refusal_of
from trainer.config.averages import settle_averages
from trainer.config.compose import compose, to_config
from trainer.config.schema import Config
from trainer.rundir.directory import RunDir

DIGITS = ("experiment=digits_noise", "model.num_classes=10", "logger=none")


class Dropping(nn.Sequential):
    """A classifier of digits with dropout."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))


def config_of(*overrides: str) -> Config:
    return to_config(compose(list(overrides))[0])


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run_dir(tmp_path / "run", freeze(compose([*DIGITS, "trainer.device=cpu"])[0])).path


def test_help_has_an_example_and_no_argument_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == HELP
    assert main([]) == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["steps=1"], "steps: expected at least 2"),
        (["steps=x"], "steps: expected a whole number"),
        (["tolerance=0"], "tolerance: expected a number in (0, 1)"),
        (["tolerance=nan"], "tolerance: expected a number in (0, 1)"),
        (["seed=1"], "seed: unknown key"),
        (["other"], "expected one run directory"),
    ],
)
def test_what_cannot_be_meant_is_named(arguments: list[str], expected: str, run_dir: Path) -> None:
    assert refusal_of(parse, [str(run_dir), *arguments]).startswith(expected)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    assert refusal_of(parse, [str(tmp_path)]).startswith("RUN_DIR: ")


def test_averages_take_part_in_the_short_run_whatever_their_start() -> None:
    own = "ema.averages={late:{start_iter:900},rare:{update_every:100},both:{update_every:2,start_iter:1}}"
    averages = settle_averages(short(config_of("ema.start_iter=500", "ema.decays=[]", own), 4))
    assert {name: (one.start_iter, one.update_every) for name, one in averages.items()} == {
        "late": (1, 1),
        "rare": (1, 1),
        "both": (1, 2),
    }


def test_both_runs_have_the_same_micro_batches_and_an_optimizer_without_small_divisors() -> None:
    config = config_of("trainer.accumulate=2", "optimizer=any", "optimizer.name=RAdam", "schedule=cosine")
    whole, parts = unsharded(config, 4, 1e-3), sharded(config, 4, 1e-3)
    assert (whole.trainer.accumulate, parts.trainer.accumulate) == (4, 2)
    assert (whole.sharding.strategy, parts.sharding.strategy) == ("none", "fsdp")
    assert whole.optimizer == parts.optimizer and whole.optimizer.args["eps"] == 1e-3
    assert "eps" not in unsharded(config_of("optimizer=sgd"), 4, 1e-3).optimizer.args


def test_a_difference_that_is_no_number_has_failed_and_a_skipped_check_is_not_ok() -> None:
    verdicts = [Row("x", value, 1.0, "").verdict for value in (1.0, 1.1, math.nan, math.inf, None)]
    assert verdicts == ["ok", "FAILED", "FAILED", "FAILED", "FAILED"]
    assert skipped("x", "why").verdict == "skipped"


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("steps", [3, 400, 100_000])
def test_an_average_has_its_profile_wherever_it_starts(dtype: str, steps: int) -> None:
    """Also where the run ends before the start, or before the second update."""
    average = EMAConfig(type="power", start_iter=350, update_every=30, dtype=dtype)
    allowed = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 0.1}[dtype]
    assert deviation(average, None, steps, torch.device("cpu")) <= allowed


def test_a_model_that_cannot_be_sharded_is_skipped_and_not_ok(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(short_run: RunDir, processes: int, allowed: object) -> None:
        if processes > 1:
            raise RunFailed(2, "sharding: one block")
        if short_run.path.name != "whole":
            raise RunFailed(1, "no memory")

    monkeypatch.setattr("launch.certifying.checks.train", train)
    assert main([str(run_dir)]) == 1
    printed = capsys.readouterr().out
    assert f"{SHARDED}: skipped" in printed and "sharding: one block" in printed
    assert "no memory" in printed
    assert sorted(path.name for path in run_dir.glob(".*")) == []


def test_a_metric_that_is_not_finite_is_no_number_in_the_comparison(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(network: object) -> dict[str, torch.Tensor]:
        return {"loss": torch.tensor([math.nan])}

    evaluated = SimpleNamespace(
        network=SimpleNamespace(module=nn.Identity()),
        evaluation=SimpleNamespace(evaluate=evaluate),
        task=SimpleNamespace(primary_metric="loss"),
    )
    monkeypatch.setattr("launch.certifying.checks.build_evaluated", lambda *_: evaluated)
    save_file({}, tmp_path / "exported.safetensors")
    (run_dir / "metrics.jsonl").write_text('{"train/step": 4, "eval/live/loss": null}\n')
    checks = Checks(parse([str(run_dir)]), tmp_path)
    name, recorded, found = checks._evaluated(tmp_path / "exported.safetensors", RunDir.open(run_dir), "live")
    assert name == "loss" and math.isnan(recorded) and math.isnan(found)


def test_a_refused_continuation_has_failed(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(short_run: RunDir, processes: int, allowed: object) -> None:
        if short_run.path.name == "resumed":
            raise RunFailed(2, "resume: other names")

    monkeypatch.setattr("launch.certifying.checks.train", train)
    row = Checks(parse([str(run_dir)]), tmp_path).resumed()
    assert (row.verdict, "resume: other names" in row.detail) == ("FAILED", True)


def test_a_model_with_dropout_is_skipped(tmp_path: Path) -> None:
    target = ("model=custom", f"model._target_={__name__}.Dropping", "trainer.device=cpu")
    made = make_run_dir(tmp_path / "run", freeze(compose([DIGITS[0], *target, "logger=none"])[0]))
    request = parse([str(made.path), "allow_targets=[tests.]"])
    row = Checks(request, tmp_path).sharded()
    assert (row.verdict, "dropout" in row.detail) == ("skipped", True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_short_run_and_leaves_nothing(
    number: signal.Signals, code: int, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short run is a program that sends us the signal and would wait for a minute."""
    before = sorted(run_dir.iterdir())
    program = f"import os, time; os.kill(os.getppid(), {int(number)}); time.sleep(60)"
    monkeypatch.setattr("launch.certifying.running.launcher", lambda _: [sys.executable, "-c", program])
    # A shell that starts the tests in the background makes them ignore SIGINT.
    before_test = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main([str(run_dir)]) == code
    except SystemExit as error:
        assert error.code == code
    finally:
        signal.signal(signal.SIGINT, before_test)
    assert sorted(run_dir.iterdir()) == before
