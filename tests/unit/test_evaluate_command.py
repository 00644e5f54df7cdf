"""The command line of `launch.evaluate`, and which checkpoint and weights it means."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.choice import choose_checkpoint, choose_weights
from launch.evaluate import HELP, Request, main, parse
from trainer.config import ConfigError
from trainer.files import write_exclusively
from trainer.report.records import STEP
from trainer.rundir import RunDir


def test_defaults_are_the_last_step_and_all_weights() -> None:
    assert parse(["run"]) == (Request(Path("run"), "last", ("*",), None), [])


def test_own_keys_are_told_from_overrides() -> None:
    request, overrides = parse(
        ["a=b/run", "step=40", "data=digits", "weights=live,ema/0.9*", "+data.x=1", "out=x/y.json"]
    )
    assert request == Request(Path("a=b/run"), 40, ("live", "ema/0.9*"), Path("x/y.json").absolute())
    assert overrides == ["data=digits", "+data.x=1"]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("step=first", "step: expected last, best or a number of steps, got 'first'"),
        ("step=-1", "step: expected last, best or a number"),
        ("step=", "step: expected last, best or a number"),
        ("weights=live,", "weights: expected names or patterns"),
        ("out=", "out: expected a file to make"),
        ("other_run", "other_run: expected RUN_DIR first and then KEY=VALUE"),
        ("--cfg", "--cfg: expected RUN_DIR first"),
    ],
)
def test_what_cannot_be_meant_is_named(argument: str, expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(["run", argument])
    assert str(refused.value).startswith(expected)


def test_help_shows_two_examples_and_no_argument_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == HELP
    assert HELP.rpartition("examples:\n")[2].count("launch.evaluate") == 2
    assert main([]) == 2


RUN_KEYS = ["ema.decay=0.9", "ema=off", "seed=1", "trainer.steps=9", "trainer={eval_samples:1}", "resume=x",
            "optimizer.lr=1", "experiment=quickstart", "run_dir=x", "logger=none", "trainer.eval_every=1"]  # fmt: skip


@pytest.mark.parametrize("override", RUN_KEYS)
def test_what_makes_another_run_is_refused_by_its_key(
    tmp_path: Path, override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = made(tmp_path, {})
    assert main([str(run_dir.path), override]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {override.partition('=')[0]}: an evaluation keeps the run's own")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: RUN_DIR: {tmp_path} is no run directory")


def made(folder: Path, metrics: dict[int, dict[str, Any]], steps: tuple[int, ...] = ()) -> RunDir:
    """A run directory with these records and with committed, empty checkpoints of these steps."""
    meta = {"primary_metric": "loss", "higher_is_better": ["accuracy"]}
    run_dir = RunDir.create(folder / "run", config_yaml="{}\n", overrides=[], meta=meta)
    lines = [json.dumps({STEP: step, **record}) + "\n" for step, record in metrics.items()]
    run_dir.metrics_path.write_text("".join(lines))
    for step in steps:
        path = run_dir.checkpoints / f"step-{step:08d}"
        path.mkdir(parents=True)
        (path / "COMMIT.json").write_text("{}")
    return run_dir


METRICS = {
    10: {"eval/live/loss": 3.0, "eval/ema/0.9/loss": 1.0},
    20: {"eval/live/loss": 2.5, "eval/ema/0.9/loss": 2.0, "eval/live/accuracy": 0.9},
    30: {"eval/live/loss": 2.2, "eval/ema/0.9/loss": None, "eval/live/accuracy": 0.1},
    40: {"train/loss": 0.5},
}


def test_last_and_numbers_are_committed_checkpoints(tmp_path: Path) -> None:
    run_dir = made(tmp_path, METRICS, steps=(20, 30, 40))
    (run_dir.checkpoints / "step-00000050").mkdir()  # never committed
    assert choose_checkpoint(run_dir, "last") == (run_dir.checkpoints / "step-00000040", 40)
    assert choose_checkpoint(run_dir, 20)[1] == 20
    for missing in (10, 50):
        with pytest.raises(ConfigError, match=f"no checkpoint of step {missing}; .* steps 20, 30, 40"):
            choose_checkpoint(run_dir, missing)


def test_best_is_of_any_weights_by_the_primary_metric_among_checkpoints_that_exist(tmp_path: Path) -> None:
    # Step 10 was better, and its checkpoint is gone; at step 20 an average beats all of step 30.
    run_dir = made(tmp_path, METRICS, steps=(20, 30, 40))
    assert choose_checkpoint(run_dir, "best")[1] == 20
    run_dir.update_meta(primary_metric="accuracy")
    assert choose_checkpoint(run_dir, "best")[1] == 20
    run_dir.update_meta(higher_is_better=[])
    assert choose_checkpoint(run_dir, "best")[1] == 30


def test_best_needs_a_checkpoint_that_was_evaluated(tmp_path: Path) -> None:
    run_dir = made(tmp_path, METRICS, steps=(40,))
    with pytest.raises(
        ConfigError, match=r"step: expected a checkpoint that was evaluated for best; .* step 40"
    ):
        choose_checkpoint(run_dir, "best")


def test_a_run_without_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        choose_checkpoint(made(tmp_path, METRICS), "last")


def test_patterns_keep_the_order_of_the_checkpoint() -> None:
    names = ["0.9", "0.99", "power"]
    assert choose_weights(["*"], names) == ["live", "ema/0.9", "ema/0.99", "ema/power"]
    assert choose_weights(["ema/0.9?", "live"], names) == ["live", "ema/0.99"]
    assert choose_weights(["ema/0.9"], names) == ["ema/0.9"]
    assert choose_weights(["live"], []) == ["live"]
    with pytest.raises(ConfigError, match=r"weights: 'ema/\*' names none of live$"):
        choose_weights(["live", "ema/*"], [])
    with pytest.raises(ConfigError, match=r"weights: '0.9' names none of live, ema/0.9, ema/0.99, ema/power"):
        choose_weights(["0.9"], names)


def test_a_file_made_exclusively_replaces_none_and_leaves_nothing_aside(tmp_path: Path) -> None:
    write_exclusively(tmp_path / "new" / "x.json", "one")
    with pytest.raises(FileExistsError):
        write_exclusively(tmp_path / "new" / "x.json", "two")
    assert [(path.name, path.read_text()) for path in (tmp_path / "new").iterdir()] == [("x.json", "one")]
