"""The command line of `launch.evaluate`."""

from pathlib import Path

import pytest

from launch.evaluate import HELP, main, parse
from launch.evaluating.checkpoint import data_note
from launch.evaluating.request import Request
from tests.makers import make_run_dir
from trainer.config.eval_sets import part_of_the_data
from trainer.errors import ConfigError
from trainer.rundir.files import write_exclusively


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
        ("out=results/", "out: expected a file to make, got results/"),
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
    run_dir = make_run_dir(tmp_path / "run", primary_metric="loss", higher_is_better=[])
    assert main([str(run_dir.path), override]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {override.partition('=')[0]}: an evaluation cannot change it")


def test_a_key_that_nothing_has_is_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run_dir(tmp_path / "run", primary_metric="loss", higher_is_better=[])
    assert main([str(run_dir.path), "nothing=1"]) == 2
    assert capsys.readouterr().err.startswith("error: nothing: unknown key; expected step, weights, ")
    assert main([str(run_dir.path), "trainer.eval_sample=1"]) == 2
    assert capsys.readouterr().err.endswith(": unknown key; did you mean trainer.eval_samples?\n")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: RUN_DIR: {tmp_path} is no run directory")


def test_a_file_made_exclusively_replaces_none_and_leaves_nothing_aside(tmp_path: Path) -> None:
    write_exclusively(tmp_path / "new" / "x.json", "one")
    with pytest.raises(FileExistsError):
        write_exclusively(tmp_path / "new" / "x.json", "two")
    assert [(path.name, path.read_text()) for path in (tmp_path / "new").iterdir()] == [("x.json", "one")]


def test_data_that_is_cut_in_another_way_may_have_been_trained_on_and_that_is_told() -> None:
    assert data_note(["data.eval_fraction=0.5"]) == (
        "data.eval_fraction: these samples may include samples that the run was trained on"
    )
    assert data_note(["data=text_files", "data.paths=[new.txt]"]) is None
    assert data_note(["trainer.eval_samples=8"]) is None


@pytest.mark.parametrize(
    ("count", "split", "data", "expected"),
    [
        (50, 50, {}, "all 50 samples of the evaluation split"),
        (50, 50, {"eval_fraction": 0.1}, "all 50 samples of the evaluation split (data.eval_fraction=0.1)"),
        (50, 50, {"eval_fraction": 0.1, "eval_path": "x"}, "all 50 samples of the evaluation split"),
        (
            32,
            50,
            {"eval_fraction": None, "eval_path": None},
            "32 of 50 samples of the evaluation split; trainer.eval_samples=0 takes all",
        ),
    ],
)
def test_the_part_of_the_data_that_is_evaluated_is_named(
    count: int, split: int, data: dict[str, float | str | None], expected: str
) -> None:
    assert part_of_the_data(count, split, data) == expected
