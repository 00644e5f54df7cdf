"""Signals on their way to a run: the ranks get them, past torchrun; what was not saved is not called stopped."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.sweeps.attempt import Attempt, read_attempts
from tests.integration.commands import until

ROOT = Path(__file__).parents[2]
KEEPER = """
import sys
from pathlib import Path
import launch.sweeps.attempt as keeper
keeper.REPEAT_AFTER_S = float(sys.argv[1])
sys.exit(keeper.attempt(Path(sys.argv[2]), sys.argv[3:]))
"""
AGENT = """
# As torchrun: starts a rank, and would end at once if a signal came.
import os, subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], env={**os.environ, "RANK": "0"})
sys.exit(1 if rank.wait() else 0)
"""
RANK = """
import pathlib, signal, sys
folder = pathlib.Path(sys.argv[1])
def note(number):
    with (folder / "signals").open("a") as file:
        file.write(f"{number} ")
    if len((folder / "signals").read_text().split()) == int(sys.argv[2]):
        print(sys.argv[3], flush=True)
        sys.exit(75)
awaited = {signal.SIGUSR2, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
(folder / "ready").touch()
while True:
    note(signal.sigwait(awaited))
"""


def signals_heard(folder: Path) -> list[int]:
    """The signals that the rank got so far."""
    file = folder / "signals"
    return list(map(int, file.read_text().split())) if file.exists() else []


def stop(
    folder: Path, numbers: list[signal.Signals], repeat_after_s: float = 60.0, last_words: str = ""
) -> tuple[int, list[int], Attempt]:
    """Start a rank under an agent under the keeper and send the keeper these signals, one after another."""
    command = [sys.executable, "-c", AGENT, RANK, str(folder), str(len(numbers)), last_words]
    keeper = subprocess.Popen(
        [sys.executable, "-c", KEEPER, str(repeat_after_s), str(folder), *command], cwd=ROOT
    )
    try:
        until(lambda: keeper.poll() is not None or (folder / "ready").exists(), keeper.poll)
        for count, number in enumerate(numbers[:-1], start=1):
            keeper.send_signal(number)
            until(lambda n=count: keeper.poll() is not None or len(signals_heard(folder)) >= n, keeper.poll)
            assert keeper.poll() is None
        keeper.send_signal(numbers[-1])
        code = keeper.wait(60)
    finally:
        keeper.kill()
    (record,) = read_attempts(folder)
    return code, signals_heard(folder), record


def test_the_rank_hears_every_request_to_save_and_torchrun_none(tmp_path: Path) -> None:
    numbers = [signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM]
    code, heard, record = stop(tmp_path, numbers)
    # An agent that was told would have ended by the signal, 128 + n, and left its rank.
    assert code == 1 and heard == [signal.SIGUSR2] * 3
    assert record.stopped and record.exit_code == 1


def test_a_later_request_of_a_user_is_one_to_end_at_once(tmp_path: Path) -> None:
    numbers = [signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM]
    _, heard, _ = stop(tmp_path, numbers, repeat_after_s=0.0)
    assert heard == [signal.SIGUSR2, signal.SIGUSR2, signal.SIGTERM]


@pytest.mark.parametrize(
    ("last_words", "stopped"),
    [("stopped at step 3, saved", True), ("error: step 3 cannot be written", False)],
)
def test_a_run_that_was_told_to_stop_and_could_not_save_has_failed(
    tmp_path: Path, last_words: str, stopped: bool
) -> None:
    _, _, record = stop(tmp_path, [signal.SIGTERM], last_words=last_words)
    assert record.stopped == stopped
    assert stopped or record.error == "step 3 cannot be written"
