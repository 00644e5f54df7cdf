"""What the benchmarks of the averages found, each figure with its target, and the table of all."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

from rich.table import Column, Table

from tests.benchmarks.rounds import Spread


@dataclass(frozen=True)
class Target:
    """What a figure should reach."""

    bound: float
    at_least: bool = False
    """Otherwise at most."""

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g}"


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    setting: str
    what: str
    value: Spread | float | None = None
    unit: str = ""
    ms: Spread | None = None
    """Milliseconds of one call, where the figure comes from one."""
    target: Target | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the target; None without one."""
        if self.target is None or self.value is None:
            return None
        return self.target.met(self.value.median if isinstance(self.value, Spread) else self.value)

    def text(self) -> str:
        """The value with its unit, or the note of a figure that has none."""
        if self.value is None:
            return self.note
        if isinstance(self.value, Spread):
            number = str(self.value)
        else:
            number = f"{self.value:,.4g}" if abs(self.value) < 1000 else f"{self.value:,.0f}"
        return " ".join(part for part in (number, self.unit, self.note) if part)

    def verdict(self) -> str:
        """The target and whether it is met."""
        return "" if self.met is None else f"{self.target}: {'met' if self.met else 'missed'}"


def threads_text(threads: int) -> str:
    """For settings."""
    return f"{threads} thread{'s' if threads > 1 else ''}"


def milliseconds(times: Sequence[float]) -> Spread:
    """Of seconds, one a round."""
    return Spread.of([1e3 * time for time in times])


def table(sections: Iterable[tuple[str, Sequence[Figure]]]) -> Table:
    """All figures, under their section and setting; medians, and quartiles over the rounds in brackets."""
    found = Table(Column("what", no_wrap=True), Column("ms per call", no_wrap=True), "figure", "target")
    for section, figures in sections:
        for setting, group in groupby(figures, key=attrgetter("setting")):
            found.add_section()
            found.add_row(f"[bold]{section}: {setting}")
            for figure in group:
                ms = "" if figure.ms is None else str(figure.ms)
                found.add_row(f"  {figure.what}", ms, figure.text(), figure.verdict())
    return found
