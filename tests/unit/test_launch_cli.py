"""All commands of `launch` have one frame: help, one line for bad input, a traceback on request."""

import errno
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

from launch import __main__ as launch
from launch import compare, evaluate, export, merge, plan, prune, retry, status
from launch.cli import naming_files
from trainer import __main__ as trainer
from trainer.cli import run_command
from trainer.data import tokenize
from trainer.rundir.files import write_atomically

Main = Callable[[Sequence[str]], int]

COMMANDS: dict[str, tuple[Main, list[str], str]] = {
    "compare": (compare.main, ["nowhere"], "nowhere"),
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
