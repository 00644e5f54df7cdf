"""Printed commands, read back by a real shell and by Hydra's parser; the program `polyak`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.compose import parse_overrides
from trainer.shell.commands import (
    command_lines,
    composition_flags,
    hydra_quoted,
    path_argument,
    shell_quoted,
    train_command,
    typed_form,
)

NAMES = [
    "plain",
    "out/lr=0.1",
    "größe",
    "it's",
    "a,b",
    "a b",
    'say "x"',
    "$HOME",
    "`id`",
    "!!",
    "back\\slash",
    "back\\'slash\\",
    "2024_01_05",
    "1e3",
    "null",
    "True",
    "{a:1}",
    "[1]",
    "(x)",
    "~",
    "x#y",
    "tab\there",
    "esc\x1b[31m",
    "c1\x9b",
]


def read_by_hydra(text: str) -> object:
    (override,) = parse_overrides([f"key={text}"])
    return override.value()


@pytest.mark.parametrize("name", NAMES)
def test_a_quoted_value_is_the_same_text_for_hydra(name):
    assert read_by_hydra(hydra_quoted(name)) == name


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\x00\n\r"), min_size=1, max_size=20))
def test_any_text_is_the_same_for_hydra(text):
    if "${" not in text:  # an interpolation, which no command reprints
        assert read_by_hydra(hydra_quoted(text)) == text


def test_a_printed_line_has_the_same_words_in_bash_and_no_control_characters():
    line = shell_quoted(NAMES)
    assert all(character.isprintable() for character in line)
    read = "import json, sys; print(json.dumps(sys.argv[1:]))"
    done = subprocess.run(
        ["bash", "-c", f"{shell_quoted([sys.executable, '-c', read])} {line}"],
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout) == NAMES


def test_a_path_is_never_a_flag_nor_a_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [path_argument(tmp_path / name) for name in ("run", "out=x", "-m")] == ["run", "./out=x", "./-m"]


def activated(monkeypatch: pytest.MonkeyPatch, *, on_path: bool, program: str) -> None:
    folder = os.path.dirname(sys.executable)
    monkeypatch.setenv("PATH", f"{folder if on_path else '/nowhere'}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "argv", [program])


def test_commands_name_the_program_that_was_used(monkeypatch):
    activated(monkeypatch, on_path=True, program="trainer/__main__.py")
    assert command_lines("Next:", [train_command(["seed=1"])]) == ["Next:", "  python -m trainer seed=1"]
    monkeypatch.setattr(sys, "argv", ["/anywhere/bin/polyak"])
    assert train_command(["seed=1"]) == "polyak train seed=1"
    assert train_command([], 4, 2).startswith("torchrun --nnodes=2 --nproc-per-node=2 ")
    assert " --no-python polyak train  # on each of the 2 nodes" in train_command([], 4, 2)


@pytest.mark.parametrize(
    ("program", "one", "several"),
    [
        ("launch/__main__.py", "python -m trainer seed=1", "torchrun --nproc-per-node=2 -m trainer seed=1"),
        ("polyak", "polyak train seed=1", "torchrun --nproc-per-node=2 --no-python polyak train seed=1"),
    ],
)
def test_the_words_of_a_run_become_a_line_to_type(monkeypatch, tmp_path, program, one, several):
    for name in ("python", "polyak", "torchrun"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    activated(monkeypatch, on_path=True, program=program)
    run = ["-m", "trainer", "seed=1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    assert typed_form([sys.executable, *run]) == one
    assert typed_form([*launcher, *run]) == several


def test_an_environment_that_is_not_active_is_activated_first(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    activated(monkeypatch, on_path=False, program="trainer/__main__.py")
    line = train_command([])
    assert command_lines("Next:", [line]) == [
        "Next:",
        f"  source {tmp_path}/bin/activate",
        "  python -m trainer",
    ]
    (tmp_path / "bin" / "activate").unlink()  # no virtual environment: the interpreter by its path
    assert train_command([]) == f"{sys.executable} -m trainer"


def test_flags_that_choose_configuration_files_are_kept(monkeypatch):
    argv = ["x", "--config-dir", "mine", "seed=1", "-cn=other", "hydra.searchpath=[file://a]", "--cfg", "job"]
    monkeypatch.setattr(sys, "argv", argv)
    assert composition_flags() == ["--config-dir=mine", "-cn=other", "hydra.searchpath=[file://a]"]


def polyak(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    start = f"import sys; sys.path[:] = [p for p in sys.path if p]; sys.path.append({root!r});"
    code = f"{start} sys.argv[0] = 'polyak'; from launch.console import main; sys.exit(main())"
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=kept,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def strangers_folder(tmp_path: Path) -> Path:
    """A folder with packages and modules of the names of ours; each prints a line when it is imported."""
    for name in ("conf", "models", "ema"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("print('not ours')")
    for name in ("trainer.py", "launch.py"):
        (tmp_path / name).write_text("print('not ours')")
    return tmp_path


@pytest.mark.parametrize("arguments", [["train", "--cfg", "job"], ["sweep", "--help"], ["status", "--help"]])
def test_no_folder_of_the_user_hides_our_packages(arguments, strangers_folder):
    done = polyak(*arguments, cwd=strangers_folder)
    assert done.returncode == 0 and "not ours" not in done.stdout and done.stderr == ""


def test_a_folder_of_pythonpath_that_hides_ours_is_named(strangers_folder):
    (strangers_folder / "trainer.py").unlink()
    (strangers_folder / "launch.py").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "--cfg", "job"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": str(strangers_folder)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: PYTHONPATH: {strangers_folder / 'conf'}")


@pytest.mark.parametrize(
    "words", [["-m", "trainer", "--help"], ["-c", "from launch.console import main; main()"]]
)
def test_a_working_directory_that_was_removed_is_one_line(words, tmp_path):
    script = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stderr == (
        "error: the working directory was removed; change to another one\n"
    )


def test_a_tree_behind_a_link_is_found(tmp_path):
    (tmp_path / "link").symlink_to(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "--cfg", "job"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "link")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_bad_commands_are_one_line(tmp_path):
    for arguments, key in (
        (["nothing"], "nothing: no such command; expected train"),
        (["comapre"], "comapre: no such command; did you mean compare?"),
        (["completion", "csh"], "completion:"),
    ):
        done = polyak(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and done.stderr.startswith(
            f"error: {key}"
        )
    assert polyak(cwd=tmp_path).returncode == 2
    assert polyak("--version", cwd=tmp_path).stdout.startswith("polyak ")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("polyak st", ["status "]),
        ("polyak train sharding=hs", ["hsdp"]),  # bash replaces what follows the =
        ("polyak train ema.start", ["ema.start_iter="]),
        ("polyak train ema.decays", ["ema.decays="]),  # a list
        ("polyak compare out", [""]),
        ("polyak sweep launch.sl", ["launch.slots="]),
        ("polyak retry sweeps/mine launch.sig", ["launch.signal_delay_s="]),
        ("polyak retry sweeps/mine launch=pr", ["print"]),
        ("polyak evaluate run st", ["step="]),
        ("polyak evaluate run step=", ["last", "best"]),
        ("polyak export run weights=l", ["live"]),
        ("polyak plan wor", ["world="]),
    ],
)
def test_words_are_completed(line, words, tmp_path):
    done = polyak("complete", cwd=tmp_path, COMP_LINE=line, COMP_POINT=str(len(line)), BREAKS=" =:")
    assert done.stdout.split("\n")[:-1] == words
