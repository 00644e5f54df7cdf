"""Runs and sweeps whose terminal is lost while they train: all is saved, and no process is left."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.sweeps.attempt import read_attempts
from tests.forked import take_terminal
from tests.integration.commands import TIMEOUT_S, command, environment, records, run_to_end, until
from tests.integration.test_restarts import rank_pids
from tests.integration.test_sweeps import jobs, states
from tests.makers import TINY_GPT
from trainer.checkpoint.store import newest_checkpoint
from trainer.errors import EXIT_STOPPED

TINY = (*TINY_GPT, "model.n_layer=1", "model.n_embd=16", "data.max_bytes=50000", "trainer.eval_samples=4")
LONG = (*TINY, "trainer.steps=1000000", "trainer.eval_every=1000000", "trainer.log_every=10")


class Terminal:
    """A command on a terminal of its own, as ssh starts it: closing it sends SIGHUP, and writing then fails."""

    def __init__(self, *words: str, cwd: Path) -> None:
        self._master, terminal = pty.openpty()
        self.process = subprocess.Popen(
            words,
            cwd=cwd,
            env=environment({"TERM": "xterm-256color"}),
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(terminal)

    def read_until(self, pattern: str) -> None:
        """Read on until the pattern was printed."""
        text = ""
        with contextlib.suppress(OSError):  # the command has ended
            while not re.search(pattern, text, re.DOTALL) and (chunk := os.read(self._master, 65536)):
                text += chunk.decode(errors="replace")
        assert re.search(pattern, text, re.DOTALL), text[-4000:]

    def close(self) -> int:
        """Close the terminal and return the exit code of the command."""
        os.close(self._master)
        return self.process.wait(TIMEOUT_S)


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and "Z (zombie)" not in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.parametrize("processes", [1, 2], ids=["one-process", "torchrun"])
def test_a_run_saves_and_stops_when_its_terminal_is_lost(tmp_path: Path, processes: int) -> None:
    sharding = ("sharding=fsdp",) if processes > 1 else ()
    terminal = Terminal(*command(*LONG, *sharding, "run_dir=run", ranks=processes), cwd=tmp_path)
    try:
        terminal.read_until(r"[1-9]\d/1000000")
        ranks = rank_pids(terminal.process.pid)
        code = terminal.close()
    finally:
        terminal.process.kill()
    saved = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert saved is not None and int(saved.name.removeprefix("step-")) >= 10
    # torchrun has its own codes: 1, or Python's 120 where its last output was buffered and cannot reach the terminal.
    assert code in ((1, 120) if processes > 1 else (EXIT_STOPPED,))
    assert len(ranks) == (processes if processes > 1 else 0) and not any(map(is_alive, ranks))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_a_sweep_stops_all_its_runs_saved_when_its_terminal_is_lost(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    arguments = ("-m", *LONG, "seed=0,1,2", "launch.slots=2", "sweep_dir=sweep")
    terminal = Terminal(*command(*arguments, module="launch"), cwd=tmp_path)
    try:
        terminal.read_until("started.*started")
        until(lambda: all(records(sweep / job["run_dir"]) for job in jobs(sweep)[:2]), lambda: jobs(sweep))
        code = terminal.close()
    finally:
        terminal.process.kill()
    check_stopped(sweep, code, started=2)


def check_stopped(sweep: Path, code: int, started: int) -> None:
    assert (code, states(sweep)) == (EXIT_STOPPED, ["pending"] * (started + 1))
    for job in jobs(sweep)[:started]:
        run_dir = sweep / job["run_dir"]
        (attempt,) = read_attempts(run_dir)
        assert (attempt.stopped, attempt.exit_code) == (True, EXIT_STOPPED) and not is_alive(attempt.pid)
        assert newest_checkpoint(run_dir / "checkpoints") is not None


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_ctrl_c_that_ends_the_reader_of_a_sweep_too_stops_its_run_saved(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    arguments = ("-m", *LONG, "seed=0,1", "launch.slots=1", "sweep_dir=sweep")
    line = '"$@" 2>&1 | cat; echo "code ${PIPESTATUS[0]}" >code'  # bash itself waits for both
    with (tmp_path / "printed").open("w") as printed:
        process = subprocess.Popen(
            ["bash", "-c", f"trap : INT; {line}", "bash", *command(*arguments, module="launch")],
            cwd=tmp_path,
            env=environment(),
            stdout=printed,
            start_new_session=True,
        )
    try:
        started = tmp_path / "printed"
        until(lambda: "started" in started.read_text(), started.read_text)
        until(lambda: records(sweep / jobs(sweep)[0]["run_dir"]), lambda: jobs(sweep))
        os.killpg(process.pid, signal.SIGINT)
        process.wait(TIMEOUT_S)
    finally:
        process.kill()
    check_stopped(sweep, int((tmp_path / "code").read_text().split()[1]), started=1)


LOST_INTERRUPT = """
import os, signal
from models.gpt import GPT

class Lost:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)  # Python prints and forgets an exception of __del__

def model(**sizes):
    Lost()
    return GPT(**sizes)
"""


def test_ctrl_c_while_the_model_is_built_ends_the_run_wherever_it_comes(tmp_path: Path) -> None:
    (tmp_path / "my_slow.py").write_text(LOST_INTERRUPT)
    run = (*TINY, "model._target_=my_slow.model", "trainer.steps=1", "run_dir=run")
    done = run_to_end(command(*run), cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (-signal.SIGINT, "interrupted"), done.stderr
    assert not (tmp_path / "run").exists()
