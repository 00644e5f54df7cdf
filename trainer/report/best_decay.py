"""Which decay is best, as far as the evaluations tell."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.report.group import Group
from trainer.report.verdicts import Row


@dataclass(frozen=True)
class Optimum:
    """The best horizon 1 / (1 - decay) at the last evaluation, in optimizer steps, and where it may lie.

    The interval reaches from the longest tested horizon that is clearly worse than the best one, below it, to the
    shortest that is, above it (`Row.may_be_best`, 95 %). That holds for any curve with one minimum over the horizon,
    and asks for nothing else: a parabola through 3 or 4 points a decade apart would give a narrower interval, from
    its assumed shape.
    """

    best: float
    low: float | None
    """None: no shorter horizon is clearly worse."""
    high: float | None
    """None: no longer horizon is clearly worse."""

    def __str__(self) -> str:
        best = f"best tested decay {decay_text(self.best)}; the optimum lies"
        if self.low is not None and self.high is not None:
            return f"{best} between {decay_text(self.low)} and {decay_text(self.high)}"
        if self.low is not None:
            return f"{best} above {decay_text(self.low)}, and no longer average is clearly worse"
        if self.high is not None:
            return f"{best} below {decay_text(self.high)}, and no shorter average is clearly worse"
        return f"{best} anywhere: no other tested decay is clearly worse"


def decay_text(horizon: float) -> str:
    """The decay of a horizon, with the digits that matter: 0.999, not 0.9990000001."""
    return f"{1 - 1 / horizon:.6g}"


def horizons_of(group: Group, rows: Sequence[Row]) -> list[tuple[float, Row]]:
    """(horizon, row) of the averages that have one and were there at the last evaluation, by rising horizon."""
    last_step = max((row.last_step for row in rows), default=0)
    found = [
        (group.horizons[row.weights], row)
        for row in rows
        if row.weights in group.horizons and row.last_step == last_step and row.last.value == row.last.value
    ]
    return sorted(found, key=lambda pair: pair[0])


def optimum(group: Group, rows: Sequence[Row]) -> Optimum | None:
    """Where the best horizon may lie; None with fewer than three to tell from, or of a metric without a direction."""
    points = [point for point in horizons_of(group, rows) if point[1].is_eligible]
    may_be = [place for place, (_, row) in enumerate(points) if row.may_be_best]
    if len(points) < 3 or not may_be:
        return None
    higher = bool(group.higher_is_better(points[0][1].metric))
    best = (max if higher else min)(points, key=lambda point: point[1].last.value)[0]
    below, above = points[: may_be[0]], points[may_be[-1] + 1 :]
    return Optimum(best, below[-1][0] if below else None, above[0][0] if above else None)
