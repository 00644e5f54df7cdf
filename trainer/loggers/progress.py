"""How far a run is: a live display on a terminal, plain lines everywhere else."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from trainer.report.status import RunStatus
from trainer.rundir.keys import EVALUATION

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

REDRAW_S = 0.2
"""Seconds between two drawings: faster than this nobody reads, and each costs milliseconds."""


class NullProgress:
    """Shows nothing: the display of the ranks above 0."""

    def update(self, step: int) -> None:
        """Show nothing."""

    def report(self, step: int, record: dict[str, float]) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""


class Progress:
    """The display of a run: a context manager around the loop that gets each step and each record.

    On a terminal it redraws in place; elsewhere, and on a terminal that cannot (`TERM=dumb`), every record is one
    line. `NO_COLOR` is respected. It draws from the calling thread, so that nothing runs beside the training.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        stream: TextIO | None = None,
        metric: str = "loss",
        higher_is_better: bool = False,
    ) -> None:
        """Prepare a display.

        Args:
            total_steps: Steps of the whole run.
            start_step: Steps done already, by an earlier session.
            stream: Where to draw; standard error if None, so that results have standard output to themselves.
            metric: Evaluation metric to show.
            higher_is_better: Its direction, which says what the best average is.
        """
        self._stream = stream or sys.stderr
        unicode = "utf" in (getattr(self._stream, "encoding", None) or "utf-8").lower()
        self._status = RunStatus(
            total_steps, metric, higher_is_better, start_step, plus_minus="±" if unicode else "+/-"
        )
        self._first: tuple[int, float] | None = None
        self._drawn_at = 0.0
        self._live: Live | None = None
        self._console: Console | None = None

    def __enter__(self) -> Self:
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream)
            if not console.is_dumb_terminal:
                self._console = console
                self._live = Live(console=console, auto_refresh=False, get_renderable=self._drawing)
                self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            # stop() draws once more: the last state stays on the terminal, also under a traceback.
            self._live.stop()
            self._live = None

    def update(self, step: int) -> None:
        """Show that `step` is done; the loop calls this after every step."""
        self._status.step = step
        now = time.monotonic()
        if self._first is None:
            # The first step may compile or fill caches, so the time left is computed from the steps after it.
            self._first = step, now
        if self._live is not None and now - self._drawn_at >= REDRAW_S:
            self._drawn_at = now
            self._live.refresh()

    def report(self, step: int, record: dict[str, float]) -> None:
        """Show a logged record: the values of its training step, and of its evaluation if it had one."""
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
        """Print a line, above the display if there is one."""
        if self._live is not None and self._console is not None:
            # soft_wrap: a path stays one line and can be copied.
            self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
        else:
            self._print(text)

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def _time_left(self) -> str | None:
        """At the mean pace since the first step of this session."""
        if self._first is None or self._status.step <= self._first[0]:
            return None
        return self._status.time_left(
            (time.monotonic() - self._first[1]) / (self._status.step - self._first[0])
        )

    def _drawing(self) -> "RenderableType":
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
        lines = [status.training(), status.evaluated() + status.divergence()]
        return Group(bar, *(Text("   ".join(line)) for line in lines if line))
