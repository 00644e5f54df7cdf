"""Estimate the best decay from the last evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.report.group import Group
from trainer.report.verdicts import Row


@dataclass(frozen=True)
class Optimum:
    """The best tested horizon at the last evaluation, in optimizer steps, and a 95 % interval of the optimum.

    A horizon is 1 / (1 - decay). The interval ends at the nearest tested horizons, below and above the best one, that
    are clearly worse (`Row.may_be_best`). It is valid for every curve with a single minimum over the horizon. A
    parabola through 3 or 4 points a decade apart would give a narrower interval, but only because of its assumed shape.
    """

    best: float
    low: float | None
    """Lower end; None if no shorter horizon is clearly worse."""
    high: float | None
    """Upper end; None if no longer horizon is clearly worse."""

    def __str__(self) -> str:
        tested = f"best tested decay {decay_text(self.best)}"
        best = f"{tested}; the optimum is"
        if self.low is not None and self.high is not None:
            return f"{best} between {decay_text(self.low)} and {decay_text(self.high)}"
        if self.low is not None:
            return f"{best} above {decay_text(self.low)}; no longer average is clearly worse"
        if self.high is not None:
            return f"{best} below {decay_text(self.high)}; no shorter average is clearly worse"
        return f"{tested}; no other tested decay is clearly worse"


def decay_text(horizon: float) -> str:
    """Format the decay of a horizon without rounding noise: 0.999, not 0.9990000001."""
    return f"{1 - 1 / horizon:.6g}"


def horizons_of(group: Group, rows: Sequence[Row]) -> list[tuple[float, Row]]:
    """Return (horizon, row) by increasing horizon, for averages with a horizon and a value at the last evaluation."""
    last_step = max((row.last_step for row in rows), default=0)
    points = [
        (group.horizons[row.weights], row)
        for row in rows
        if row.weights in group.horizons and row.last_step == last_step and row.last.value == row.last.value
    ]
    return sorted(points, key=lambda point: point[0])


def optimum(group: Group, rows: Sequence[Row]) -> Optimum | None:
    """Estimate the best horizon; None with fewer than three horizons or for a metric without a direction."""
    points = [point for point in horizons_of(group, rows) if point[1].is_eligible]
    candidates = [index for index, (_, row) in enumerate(points) if row.may_be_best]
    if len(points) < 3 or not candidates:
        return None
    higher = bool(group.higher_is_better(points[0][1].metric))
    best = (max if higher else min)(points, key=lambda point: point[1].last.value)[0]
    below, above = points[: candidates[0]], points[candidates[-1] + 1 :]
    return Optimum(best, below[-1][0] if below else None, above[0][0] if above else None)
