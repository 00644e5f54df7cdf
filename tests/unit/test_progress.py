"""The display: lines where there is no terminal, one drawing in place where there is one (a real pseudo-terminal)."""

import contextlib
import io
import os
import pty
import re
import time

import pytest

from trainer.loggers.progress import Progress
from trainer.report.status import RunStatus

RECORD = {
    "train/loss": 1.75,
    "train/lr": 0.001,
    "throughput/samples_per_s": 1234.0,
    "ema/0.99/rel_l2": 0.02,
    "ema/0.999/rel_l2": 0.05,
}
EVALUATION = {
    "eval/live/loss": 1.9,
    "eval/ema/0.999/loss": float("nan"),  # first: min() keeps a NaN that it meets first
    "eval/ema/0.99/loss": 1.85,
    "eval/ema/warmup_0.999/loss": 1.8,
    "eval/gap/0.99/loss": 0.05,
    "eval/gap/0.99/loss_se": 0.01,
    "eval/gap/warmup_0.999/loss": 0.1,
    "eval/gap/warmup_0.999/loss_se": 0.02,
}


class Terminal:
    """The writing end of a pseudo-terminal."""

    def __init__(self) -> None:
        self._reader, writer = pty.openpty()
        self.stream = os.fdopen(writer, "w", encoding="utf-8")

    def text(self) -> str:
        """All that was written to it; it is closed by that."""
        self.stream.close()
        written = b""
        # A closed terminal ends with an error on Linux, with nothing elsewhere.
        with contextlib.suppress(OSError):
            while chunk := os.read(self._reader, 65536):
                written += chunk
        return written.decode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def lines_of(**choices: object) -> list[str]:
    stream = io.StringIO()
    with Progress(100, stream=stream, **choices) as progress:  # type: ignore[arg-type]
        for step in range(1, 21):
            progress.update(step)
        progress.report(10, RECORD)
        progress.report(20, RECORD | EVALUATION)
        progress.note("saved [a]")
    return stream.getvalue().splitlines()


def test_without_a_terminal_each_record_is_one_line_and_steps_are_silent() -> None:
    first, second, note = lines_of()
    assert first.startswith("step 10/100  loss 1.7500  lr 0.001  1,234 samples/s")
    assert "eval" not in first
    assert "eval live 1.9000  best EMA warmup_0.999 1.8000  gap +0.100 ± 0.020 SE" in second
    assert re.search(r"\d:\d\d:\d\d left$", second)
    assert note == "saved [a]"


def test_a_note_with_a_name_from_a_checkpoint_does_not_control_the_terminal(terminal: Terminal) -> None:
    stream = io.StringIO()
    for place in (stream, terminal.stream):
        with Progress(100, stream=place) as progress:
            progress.note("ema/\x1b[31mred\n is not kept")
    assert stream.getvalue() == "ema/\\x1b[31mred  is not kept\n"
    assert "\x1b[31m" not in terminal.text()


def test_the_best_average_follows_the_direction_of_the_metric() -> None:
    assert "best EMA 0.99 1.8500  gap +0.050" in lines_of(higher_is_better=True)[1]


def test_time_left_is_the_pace_of_this_session(monkeypatch: pytest.MonkeyPatch) -> None:
    # Resumed at step 1000; steps 1001 to 1011 end 2 s apart, so the 489 left take 978 s.
    clock = iter(float(2 * tick) for tick in range(100))
    monkeypatch.setattr("trainer.loggers.progress.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    with Progress(1500, start_step=1000, stream=stream) as progress:
        for step in range(1001, 1012):
            progress.update(step)
        monkeypatch.setattr("trainer.loggers.progress.time.monotonic", lambda: 20.0)
        progress.report(1011, RECORD)
    assert stream.getvalue().endswith("0:16:18 left\n")


def test_a_terminal_shows_bar_values_and_divergence_of_the_best_average(terminal: Terminal) -> None:
    with Progress(100, stream=terminal.stream) as progress:
        progress.update(20)
        progress.report(20, RECORD | EVALUATION | {"ema/warmup_0.999/rel_l2": 0.03})
        progress.note("a note")
    shown = terminal.text()
    for part in (
        "━",
        "20/100",
        "loss 1.7500",
        "gap +0.100 ± 0.020 SE",
        "rel_l2 3.00e-02",
        "a note",
        "\x1b[38",
    ):
        assert part in shown
    assert shown.rstrip("\r\n").endswith("\x1b[?25h")  # the cursor is back


def test_no_color_draws_without_colours(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with Progress(100, stream=terminal.stream) as progress:
        progress.report(20, RECORD)
    assert "loss 1.7500" in (shown := terminal.text())
    assert "\x1b[3" not in shown


def test_a_dumb_terminal_gets_plain_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with Progress(100, stream=terminal.stream) as progress:
        progress.report(20, RECORD)
    assert "step 20/100  loss 1.7500" in (shown := terminal.text())
    assert "\x1b" not in shown


def test_an_exception_leaves_the_terminal_usable(terminal: Terminal) -> None:
    with pytest.raises(KeyboardInterrupt), Progress(100, stream=terminal.stream) as progress:
        progress.update(1)
        raise KeyboardInterrupt
    assert "\x1b[?25h" in terminal.text()


def test_a_stream_that_knows_ascii_only_is_no_reason_to_fail() -> None:
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding="ascii")
    with Progress(100, stream=stream) as progress:
        progress.report(20, RECORD | EVALUATION)
    assert b"gap +0.100 +/- 0.020" in buffer.getvalue()


def test_a_step_that_draws_nothing_costs_under_20_microseconds(terminal: Terminal) -> None:
    with Progress(10**6, stream=terminal.stream) as progress:
        progress.update(1)
        costs = []
        for _ in range(5):
            begin = time.perf_counter()
            for step in range(1000):
                progress.update(step)
            costs.append((time.perf_counter() - begin) / 1000)
    assert min(costs) < 20e-6


def test_on_80_columns_nothing_is_wider_and_no_text_is_broken(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    warning = "warning: ema 0.997: remembers 333 iterations and sees 60; 84% of it is still the first weights"
    path = f"written: /{'a' * 60}/{'b c' * 20}"
    with Progress(100, stream=terminal.stream) as progress:
        progress.note(warning)
        progress.note(path)
        progress.report(20, RECORD | EVALUATION | {"ema/warmup_0.999/rel_l2": 0.03})
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.text()))
    assert path in lines and all(len(line) <= 80 for line in lines if line != path)
    shown = "\n".join(lines)
    assert "rel_l2 3.00e-02" in shown and "   gap +0.100 ± 0.020 SE" in shown
    assert warning in " ".join(shown.split())


@pytest.mark.parametrize(
    ("gap", "error", "text"),
    [
        (1.234e-6, 2.5e-7, "+1.23e-06 ± 2.5e-07 SE"),  # not +0.0000 ± 0.0000
        (0.5, 0.0, "+0.5000"),  # equal differences have no standard error
        (-1e-9, 0.011, "+0.000 ± 0.011 SE"),
        (2e-5, float("nan"), "+2.000e-05"),
        (0.5, 0.0996, "+0.50 ± 0.10 SE"),
        (0.123456789, 1e-9, "+1.234567890e-01 ± 1.0e-09 SE"),
        (1e30, 2e28, "+1.000e+30 ± 2.0e+28 SE"),
        (-0.0, 1e-8, "+0.0e+00 ± 1.0e-08 SE"),
    ],
)
def test_a_gap_has_the_digits_of_its_standard_error(gap: float, error: float, text: str) -> None:
    gaps = {"eval/gap/warmup_0.999/loss": gap, "eval/gap/warmup_0.999/loss_se": error}
    assert RunStatus(total=100).evaluated(EVALUATION | gaps)[-1] == f"gap {text}"
