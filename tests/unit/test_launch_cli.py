"""All commands of `launch` have one frame: help, one line for bad input, a traceback on request."""

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest

from launch import __main__ as launch
from launch import certify, compare, evaluate, export, merge, plan, posthoc, prune, retry, status
from launch.cli import naming_files
from launch.sweeps.config import LaunchConfig
from trainer import __main__ as trainer
from trainer.cli import run_command
from trainer.config.schema import TrainerConfig
from trainer.data import tokenize
from trainer.rundir.files import write_atomically

Main = Callable[[Sequence[str]], int]

COMMANDS: dict[str, tuple[Main, list[str], str]] = {
    "compare": (compare.main, ["nowhere", "out=report.d"], "nowhere"),
    "evaluate": (evaluate.main, ["nowhere"], "nowhere"),
    "export": (export.main, ["nowhere", "out=x.safetensors"], "nowhere"),
    "launch": (launch.main, ["ema.deca=0.9"], "ema.deca: unknown key"),
    "merge": (merge.main, ["nowhere", "profile=linear", "out=x.safetensors"], "nowhere"),
    "plan": (plan.main, ["world=none"], "world: expected numbers of processes"),
    "prune": (prune.main, ["nowhere", "keep=1"], "nowhere"),
    "retry": (retry.main, ["nowhere"], "nowhere"),
    "status": (status.main, ["nowhere"], "nowhere"),
}
"""Each command with bad input, and what its line must name."""

LAUNCH = [f"launch.{field.name}" for field in fields(LaunchConfig)]
TRAINER = [f"trainer.{field.name}" for field in fields(TrainerConfig)]

MISTYPED: dict[str, tuple[Main, list[str], str]] = {
    "certify": (certify.main, ["run", "step=4"], "step: unknown key; did you mean steps?"),
    "compare": (compare.main, ["run", "ouput=x"], "ouput: unknown key; did you mean out?"),
    "evaluate": (evaluate.main, ["run", "weight=live,ema/*"], "weight: unknown key; did you mean weights?"),
    "export": (export.main, ["run", "Weights=live"], "Weights: unknown key; did you mean weights?"),
    "launch": (launch.main, ["sweep_dri=x"], "sweep_dri: unknown key; did you mean sweep_dir?"),
    "launch's group": (
        launch.main,
        ["launch.nods=2"],
        "launch.nods: unknown key; did you mean launch.nodes?",
    ),
    "launch's group, like its own keys only": (
        launch.main,
        ["launch.mem=2"],
        "launch.mem: unknown key; did you mean launch.mem_gib?",
    ),
    "launch's group, like none": (
        launch.main,
        ["launch.jobs=2"],
        f"launch.jobs: unknown key; expected {', '.join(LAUNCH)}",
    ),
    "a group is not like its keys": (
        trainer.main,
        ["trainer.xyz=2"],
        f"trainer.xyz: unknown key; expected {', '.join(TRAINER)}",
    ),
    "merge": (merge.main, ["run", "windw=8"], "windw: unknown key; did you mean window?"),
    "merge with a list": (
        merge.main,
        ["coefs=[1,2]", "profle=x"],
        "profle: unknown key; did you mean profile?",
    ),
    "plan": (plan.main, ["worlds=8"], "worlds: unknown key; did you mean world?"),
    "posthoc": (posthoc.main, ["run", "decy=0.9"], "decy: unknown key; did you mean decay?"),
    "prune": (prune.main, ["run", "kep=1"], "kep: unknown key; did you mean keep?"),
    "retry": (retry.main, ["run", "lanch=print"], "lanch: unknown key; did you mean launch?"),
    "retry's launch": (
        retry.main,
        ["run", "lunch.nodes=1"],
        "lunch.nodes: unknown key; did you mean launch.nodes?",
    ),
    "retry with another key": (
        retry.main,
        ["run", "foo.key=1"],
        f"foo.key: unknown key; expected allow_targets, gone, launch, {', '.join(LAUNCH)}",
    ),
    "status": (status.main, ["sweep=x"], "sweep: unknown key; expected no KEY=VALUE"),
    "tokenize": (tokenize.main, ["a.txt", "vocb=8"], "vocb: unknown key; did you mean vocab?"),
    "train": (trainer.main, ["seeed=1"], "seeed: unknown key; did you mean seed?"),
}
"""Each command with a mistyped key, and its line."""


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"launch"}))
def test_help_goes_to_the_output_and_no_argument_is_bad_input(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main = COMMANDS[name][0]
    assert main(["--help"]) == 0
    help_text = capsys.readouterr().out
    assert f"usage: python -m launch.{name}" in help_text
    assert "examples:" in help_text
    assert help_text[0].isupper() and "\\" not in help_text
    assert main([]) == 2
    assert capsys.readouterr().err == help_text


@pytest.mark.parametrize("main", [*(main for main, _, _ in COMMANDS.values()), trainer.main, tokenize.main])
def test_version_is_that_of_the_project_and_of_torch(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"polyak {version('polyak')} (torch {version('torch')})\n"


@pytest.mark.parametrize("name", MISTYPED)
def test_a_mistyped_key_is_refused_with_the_key_that_it_is_like(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main, arguments, line = MISTYPED[name]
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    assert not list(Path().iterdir())


def test_a_path_with_an_equals_sign_is_no_key(capsys: pytest.CaptureFixture[str]) -> None:
    Path("ouput=1").mkdir()
    for main in (compare.main, status.main):
        assert main(["ouput=1"]) == 2
        assert "unknown key" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["-m"]])
def test_launch_without_arguments_starts_nothing_and_shows_its_help(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.main(arguments) == 2
    printed = capsys.readouterr()
    assert "python -m launch" in printed.err and not printed.out
    for name in set(COMMANDS) - {"launch"}:
        assert f"`python -m launch.{name}" in printed.err  # as `polyak` replaces it
    assert not list(Path().iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_bad_input_is_one_line_and_the_traceback_comes_on_request(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main, arguments, named = COMMANDS[name]
    assert main(arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert named in line
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert main(arguments) == 2
    assert "Traceback" in capsys.readouterr().err
    assert not list(Path().iterdir()), "a refused command leaves nothing behind"


LONG = "x" * 5000
NUMBER = "9" * 5000


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("status", [LONG]),
        ("compare", [LONG]),
        ("evaluate", [LONG]),
        ("retry", [LONG]),
        ("export", [LONG, "out=x.safetensors"]),
        ("export", ["nowhere", "out=x.safetensors", f"step={NUMBER}"]),
        ("export", ["nowhere", "out=x/", f"max_shard_size={NUMBER}GB"]),
        ("evaluate", ["nowhere", f"step={NUMBER}"]),
        ("plan", [f"world={NUMBER}"]),
        ("plan", ["world=8", f"processes_per_node={NUMBER}"]),
        ("plan", ["world=8", f"out={LONG}"]),
        ("plan", ["world=8", "--unknown"]),
        ("launch", [f"sweep_dir={LONG}", "ema=fraction"]),  # an average without a warning
    ],
)
def test_absurd_paths_numbers_and_flags_are_one_line(
    name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert COMMANDS[name][0](arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert not list(Path().iterdir())


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EIO, 1), (errno.EACCES, 2)])
def test_a_disk_that_is_full_or_broken_is_one_line_and_no_bad_input(
    number: int, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    def work() -> int:
        write_atomically(Path("kept"), "new")
        return 0

    Path("kept").write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    assert run_command(lambda: naming_files(work)) == code
    assert capsys.readouterr().err == f"error: kept: {os.strerror(number)}\n"
    assert Path("kept").read_text() == "old" and len(list(Path().iterdir())) == 1
