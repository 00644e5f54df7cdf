"""Show the progress of a run: a live display on a terminal, plain lines everywhere else."""

import sys
import time
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from trainer.report.status import RunStatus
from trainer.rundir.keys import EVALUATION
from trainer.shell.printable import one_line, wrapped

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

GAP = "   "
"""Between two texts of a line of the display."""
REDRAW_S = 0.2
"""Least seconds between two drawings; each drawing takes milliseconds, and a user cannot read faster."""


class NullProgress:
    """Display that shows nothing, for the ranks above 0."""

    def update(self, step: int) -> None:
        """Do nothing."""

    def report(self, step: int, record: dict[str, float]) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""


class Progress:
    """Display of a run: a context manager around the loop, which passes each step and each record to it.

    On a terminal it redraws in place. Elsewhere, and on a terminal that cannot redraw (`TERM=dumb`), it prints one line
    per record. `NO_COLOR` turns colours off. It draws in the calling thread, so it needs no thread of its own.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        stream: TextIO | None = None,
        metric: str = "loss",
        higher_is_better: bool | None = False,
    ) -> None:
        """Prepare the display; it appears when the context is entered.

        Args:
            total_steps: number of steps of the whole run.
            start_step: number of steps that earlier sessions have done.
            stream: stream to draw on; None is standard error, so that standard output has only the results.
            metric: evaluation metric to show.
            higher_is_better: whether higher values of the metric are better; it decides which average is the best. None
                shows no average.
        """
        self._stream = stream or sys.stderr
        unicode = "utf" in (getattr(self._stream, "encoding", None) or "utf-8").lower()
        self._status = RunStatus(
            total_steps, metric, higher_is_better, start_step, plus_minus="±" if unicode else "+/-"
        )
        self._first: tuple[int, float] | None = None
        self._drawn_at = 0.0
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream)
            if not console.is_dumb_terminal:
                draw = partial(self._drawing, console)
                self._live = Live(console=console, auto_refresh=False, get_renderable=draw)
                self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            # stop() draws once more, so that the terminal shows the last state, also below a traceback.
            self._live.stop()
            self._live = None

    def update(self, step: int) -> None:
        """Show that `step` is done; the loop calls this after every step."""
        self._status.step = step
        now = time.monotonic()
        if self._first is None:
            # The first step may compile or fill caches. So the remaining time is computed from the steps after it.
            self._first = step, now
        if self._live is not None and now - self._drawn_at >= REDRAW_S:
            self._drawn_at = now
            self._live.refresh()

    def report(self, step: int, record: dict[str, float]) -> None:
        """Show a logged record: the values of its training step, and of its evaluation if there was one."""
        self._status.update(step, record)
        if self._live is None:
            left = self._time_left()
            parts = [
                f"step {step}/{self._status.total}",
                *self._status.training(record),
                *self._status.evaluated(record),
                *([f"{left} left"] if left else []),
            ]
            self._print("  ".join(parts))
        elif any(key.startswith(EVALUATION) for key in record):
            self._live.refresh()

    def note(self, text: str) -> None:
        """Print one line, above the display if there is one; it may have names from a checkpoint of a stranger."""
        text = one_line(text)
        if self._live is not None:
            console = self._live.console
            # soft_wrap keeps a path or a command on one line, so that it can be copied.
            console.print(
                wrapped(text, console.width), markup=False, highlight=False, emoji=False, soft_wrap=True
            )
        else:
            self._print(text)

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def _time_left(self) -> str | None:
        """Return the remaining time at the mean speed since this session's first step; None until its second step."""
        if self._first is None or self._status.step <= self._first[0]:
            return None
        return self._status.time_left(
            (time.monotonic() - self._first[1]) / (self._status.step - self._first[0])
        )

    def _drawing(self, console: "Console") -> "RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        left = self._time_left()
        status = self._status
        done = f"{status.step}/{status.total}" + (f"  {left} left" if left else "")
        bar.add_row(ProgressBar(total=status.total, completed=status.step), Text(done))
        lines = [
            *filled(status.training(), console.width),
            *filled(status.evaluated() + status.divergence(), console.width),
        ]
        return Group(bar, *(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))


def filled(parts: Sequence[str], width: int) -> list[str]:
    """Join texts to lines of at most `width` characters, without a break inside a text."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(GAP) + len(part) <= width:
            lines[-1] += GAP + part
        else:
            lines.append(part)
    return lines
