"""How far a run is: a live display on a terminal, plain lines everywhere else."""

import math
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from trainer.report.table import label, value

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
    """A context manager around the loop, told of each step and of each record.

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
        self._total, self._step, self._metric, self._higher = (
            total_steps,
            start_step,
            metric,
            higher_is_better,
        )
        self._stream = stream or sys.stderr
        self._between = (
            "±" if "utf" in (getattr(self._stream, "encoding", None) or "utf-8").lower() else "+/-"
        )
        self._latest: dict[str, float] = {}
        self._evaluation: dict[str, float] = {}
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
        """Say that `step` is done; called on every step."""
        self._step = step
        now = time.monotonic()
        if self._first is None:
            # The first step may compile or fill caches: the time left is told from those after it.
            self._first = step, now
        if self._live is not None and now - self._drawn_at >= REDRAW_S:
            self._drawn_at = now
            self._live.refresh()

    def report(self, step: int, record: dict[str, float]) -> None:
        """Show a logged record: the values of its training step, and of its evaluation if it had one."""
        self._step = step
        self._latest |= {key: number for key, number in record.items() if not key.startswith("eval/")}
        evaluation = {key: number for key, number in record.items() if key.startswith("eval/")}
        self._evaluation = evaluation or self._evaluation
        if self._live is None:
            shown = [f"step {step}/{self._total}", *self._training(record), *self._evaluated(evaluation)]
            self._print("  ".join([*shown, *([f"{left} left"] if (left := self._time_left()) else [])]))
        elif evaluation:
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
        """Hours, minutes and seconds at the mean pace since the first step of this session."""
        if self._first is None or self._step <= self._first[0]:
            return None
        pace_s = (time.monotonic() - self._first[1]) / (self._step - self._first[0])
        seconds = round(pace_s * max(0, self._total - self._step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def _training(self, record: dict[str, float]) -> list[str]:
        shown = []
        if "train/loss" in record:
            shown.append(f"loss {value(record['train/loss'])}")
        if "train/lr" in record:
            shown.append(f"lr {record['train/lr']:.3g}")
        if record.get("train/skipped_steps"):
            shown.append(f"skipped {record['train/skipped_steps']:.0f}")
        if "throughput/samples_per_s" in record:
            shown.append(f"{record['throughput/samples_per_s']:,.0f} samples/s")
        return shown

    def _evaluated(self, record: dict[str, float]) -> list[str]:
        """Live and the best average of one evaluation, with the gap and its standard error."""
        shown = []
        live = record.get(f"eval/live/{self._metric}")
        if live is not None:
            shown.append(f"eval live {value(live)}")
        name = self._best(record)
        if name is not None:
            shown.append(f"best {label(name)} {value(record[f'eval/ema/{name}/{self._metric}'])}")
            gap, error = (record.get(f"eval/gap/{name}/{self._metric}{end}") for end in ("", "_se"))
            if gap is not None:
                known = error is not None and math.isfinite(error)  # one sample has no standard error
                shown.append(
                    f"gap {round(gap, 4) + 0.0:+.4f}" + (f" {self._between} {error:.4f}" if known else "")
                )
        return shown

    def _best(self, record: dict[str, float]) -> str | None:
        """Name of the best average; NaN never is."""
        end = f"/{self._metric}"
        found = {
            key.removeprefix("eval/ema/").removesuffix(end): number
            for key, number in record.items()
            if key.startswith("eval/ema/") and key.endswith(end) and number == number
        }
        return (max if self._higher else min)(found, key=found.__getitem__) if found else None

    def _divergence(self) -> list[str]:
        name = self._best(self._evaluation)
        key = f"ema/{name}/rel_l2"
        return [f"rel_l2 {self._latest[key]:.2e}"] if key in self._latest else []

    def _drawing(self) -> "RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        left = self._time_left()
        done = f"{self._step}/{self._total}" + (f"  {left} left" if left else "")
        bar.add_row(ProgressBar(total=self._total, completed=self._step), Text(done))
        lines = [self._training(self._latest), self._evaluated(self._evaluation) + self._divergence()]
        return Group(bar, *(Text("   ".join(line)) for line in lines if line))
