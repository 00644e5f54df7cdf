"""A run watched while it goes on: on a terminal of its own, a real pseudo-terminal, and from another shell."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios
from pathlib import Path

import pytest

from launch import status
from tests.integration.commands import command, environment, records
from tests.makers import TINY_GPT

RUN = (
    *TINY_GPT,
    "ema.decays=[0.5,0.9]",
    "trainer.steps=1000000",
    "trainer.log_every=1",
    "trainer.eval_every=4",
)
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
NUMBER = r"[+-]?\d[\d.,]*(?:e-?\d+)?"


class Watched:
    """A command on a pseudo-terminal of 120 columns."""

    def __init__(self, *words: str, cwd: Path) -> None:
        self._reader, writer = pty.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        variables = environment({"TERM": "xterm-256color"})
        variables.pop("COLUMNS")
        variables.pop("NO_COLOR", None)
        self.process = subprocess.Popen(words, cwd=cwd, env=variables, stdout=writer, stderr=writer)
        os.close(writer)
        self.text = ""

    def read_until(self, pattern: str) -> None:
        """Read on until it was shown; escape sequences are left out."""
        with contextlib.suppress(OSError):  # a closed terminal, on Linux
            while not re.search(pattern, self.text) and (chunk := os.read(self._reader, 65536)):
                self.text = ESCAPE.sub("", self.text + chunk.decode(errors="replace"))
        assert re.search(pattern, self.text), self.text[-4000:]

    def close(self) -> None:
        self.process.kill()
        self.process.wait(60)
        os.close(self._reader)


def test_terminal_and_status_show_loss_best_gap_divergence_throughput_and_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    watched = Watched(*command("run_dir=run", *RUN), cwd=tmp_path)
    try:
        gap = rf"gap {NUMBER} (?:± {NUMBER} SE)"
        best = rf"eval live ({NUMBER}) +best EMA (0\.[59]) ({NUMBER}) +{gap}"
        watched.read_until(rf"loss {NUMBER} +lr {NUMBER} +{NUMBER} samples/s\r?\n{best} +rel_l2 {NUMBER}")
        watched.read_until(r"━ +\d+/1000000 +\d+:\d\d:\d\d left")
        assert status.main(["run"]) == 0
        first, training, evaluated = capsys.readouterr().out.splitlines()
        rank = rf"process {watched.process.pid} on "
        assert re.match(
            rf"run: running \({rank}.*\), step \d+/1000000, \d+:\d\d:\d\d left, last record 0:", first
        )
        assert re.fullmatch(rf"  loss {NUMBER}  lr {NUMBER}  {NUMBER} samples/s", training)
        watched.process.send_signal(signal.SIGKILL)
        watched.process.wait(60)
        shown = re.fullmatch(rf"  {best}  rel_l2 {NUMBER}  \(evaluated at step (\d+)\)", evaluated)
        assert shown is not None
        live, name, value, step = shown.groups()
        (record,) = [one for one in records(tmp_path / "run") if one["train/step"] == int(step)]
        assert f"{record['eval/live/loss']:.4f}" == live
        assert f"{record[f'eval/ema/{name}/loss']:.4f}" == value
        assert record[f"eval/ema/{name}/loss"] == min(record[f"eval/ema/0.{digit}/loss"] for digit in (5, 9))
    finally:
        watched.close()
    assert status.main(["run"]) == 0
    first, _, _, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("run: not running (no process holds it), step ") and "left" not in first
    assert rest == ["It has no checkpoint to continue from; start a new run."]
