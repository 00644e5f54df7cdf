"""A command's process ends, whatever threads and processes the user's code has left behind."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import multiprocessing, signal, sys, threading, time
from trainer import cli

ready = multiprocessing.get_context("fork").Event()

def stubborn():
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ready.set()
    time.sleep(1000)

def main():
    left = LEFT
    left.start()
    if pid := getattr(left, "pid", ""):
        ready.wait(20)
    print(pid)
    END

cli.END_S = 0.3
sys.exit(cli.ending(main))
"""
LEFT = {
    "thread": "threading.Thread(target=time.sleep, args=(1000,), name='of the user')",
    "process": "multiprocessing.get_context('fork').Process(target=stubborn)",
    "daemon": "multiprocessing.get_context('fork').Process(target=stubborn, daemon=True)",
}
ENDS = {"return 2": 2, "raise ValueError('a mistake')": 1, "sys.exit(3)": 3, "raise KeyboardInterrupt": 130}


@pytest.mark.parametrize(
    ("left", "end"), [*(("thread", end) for end in ENDS), ("process", "return 2"), ("daemon", "return 2")]
)
def test_the_process_ends_with_its_code_although_something_is_left(left: str, end: str) -> None:
    script = SCRIPT.replace("LEFT", LEFT[left]).replace("END\n", f"{end}\n")
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == ENDS[end], done.stderr
    *above, last = done.stderr.splitlines()
    pid = done.stdout.strip()
    what = f"process {pid}" if pid else "thread of the user"
    assert last == f"warning: ended by force: {what} did not end within 0.3 s"
    assert any(line == "ValueError: a mistake" for line in above) == ("ValueError" in end)
    if pid:
        assert not Path(f"/proc/{pid}").exists()


def test_without_anything_left_the_process_ends_as_python_ends_it() -> None:
    script = "import sys; from trainer import cli; cli.END_S = 0; sys.exit(cli.ending(lambda: 75))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (75, b"", b"")


CTRL_C = """
import os, signal, sys

interrupted = sys.argv.pop(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where it is ignored

class CtrlC:
    def find_spec(self, name, *_):
        if name == interrupted:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, CtrlC())
from launch.console import main

sys.exit(main())
"""


@pytest.mark.parametrize(("module", "command"), [("launch.posthoc", "posthoc"), ("hydra", "train")])
def test_ctrl_c_during_an_import_is_one_line(module: str, command: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CTRL_C, module, command, f"run_dir={tmp_path / 'run'}"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "interrupted\n")
    assert not list(tmp_path.iterdir())
