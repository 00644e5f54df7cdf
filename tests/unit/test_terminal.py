"""Output that can no longer be written, in real processes: a closed pipe, a lost terminal, a full disk, `>&-`."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import subprocess, sys
from trainer.shell.terminal import outlive_terminal
outlive_terminal()
for step in range(2000):
    print("step", step)
    print("note", step, file=sys.stderr, flush=True)
later = subprocess.run(["echo", "of a program started later"])
open(sys.argv[1], "w").write(f"the later program ended with {later.returncode}")
print("result")
sys.exit(7)
"""
LINES = 2002
"""Lines that the program prints on standard output."""


def run(path: Path, *flags: str, words: tuple[str, ...] = (), **streams: int | IO[bytes]) -> int:
    """Run the program with these streams to its end; return its exit code."""
    command = [*words, sys.executable, *flags, "-c", PROGRAM, str(path)]
    return subprocess.run(command, cwd=ROOT, timeout=60, check=False, **streams).returncode  # type: ignore[call-overload]


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def lost_terminal() -> int:
    master, terminal = pty.openpty()
    os.close(master)
    return terminal


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("flags", [(), ("-u",)], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    ("dead", "of_a_later_program"),
    [(closed_pipe, 0), (lost_terminal, 0), (full_disk, 1)],  # a disk may have room again: it is tried again
)
def test_a_command_goes_on_without_its_output_and_ends_with_its_own_code(
    tmp_path: Path, dead: Callable[[], int], of_a_later_program: int, flags: tuple[str, ...]
) -> None:
    stream = dead()
    try:
        assert run(tmp_path / "done", *flags, stdout=stream, stderr=stream) == 7
    finally:
        os.close(stream)
    assert (tmp_path / "done").read_text() == f"the later program ended with {of_a_later_program}"


def test_what_can_be_read_arrives_whole_also_through_a_pipe_that_never_waits(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(os.devnull, "wb") as null:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "done")], cwd=ROOT, stdout=writer, stderr=null
        )
    os.close(writer)
    with os.fdopen(reader, "rb") as printed:
        assert len(printed.read().splitlines()) == LINES
    assert process.wait(60) == 7


def test_a_file_never_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    shell = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")
    assert run(tmp_path / "done", words=shell) == 7
    assert (tmp_path / "done").read_text() == "the later program ended with 0"


def test_a_command_that_only_prints_ends_quietly_when_its_reader_has_gone() -> None:
    pipe = closed_pipe()
    done = subprocess.run(
        [sys.executable, "-m", "launch.compare", "--help"],
        cwd=ROOT,
        stdout=pipe,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(pipe)
    assert (done.returncode, done.stderr) == (0, b"")


INTERRUPTED = """
import os, signal
from trainer.cli import importing

signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where it is ignored

class Lost:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)  # Python prints and forgets an exception of __del__

with importing():
    Lost()
    print("went on", flush=True)
"""


def test_ctrl_c_during_imports_ends_the_command_wherever_it_comes() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=ROOT, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"interrupted\n")


def test_ctrl_c_that_ends_the_reader_of_the_output_too_ends_the_command() -> None:
    stderr = closed_pipe()
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=ROOT, stderr=stderr, stdout=-1, timeout=60)
    os.close(stderr)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, b"")
