"""Estimate the best decay from the last evaluation.

Two intervals of the optimum are combined. The first needs no shape: it ends at the nearest tested horizons, below and
above the best one, that are clearly worse (`Row.may_be_best`). It is valid for every curve with a single minimum.

The second is within the first. It passes smooth curves through the best horizon and these two ends: a parabola over
log horizon, and c + a h^-p + b h^q with p = 0.5, 1 and q = 0.5, 1, 2: noise that shrinks with the horizon h, and a lag
that grows with it. Each curve has a minimum at every horizon where its slope, a linear combination of two paired
differences, is not clearly different from zero (E. C. Fieller, "Some problems in interval estimation", J. R. Statist.
Soc. B 16, 1954). The interval covers these horizons for all curves, so that it does not rest on one assumed shape.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.report.group import Array, Group
from trainer.report.pairs import eliminated_at, moments_of
from trainer.report.statistics import ALPHA, t_quantile
from trainer.report.verdicts import Row
from trainer.rundir.pairs import Moments

Curve = tuple[Callable[[Array], Array], Callable[[Array], Array]]
"""A function of the log of the horizon and its slope."""


def _power(exponent: float) -> Curve:
    return lambda u: np.exp(exponent * u), lambda u: exponent * np.exp(exponent * u)


SHAPES: tuple[tuple[Curve, Curve], ...] = (
    ((lambda u: u, np.ones_like), (np.square, lambda u: 2 * u)),
    *((_power(-p), _power(q)) for p in (0.5, 1) for q in (0.5, 1, 2)),
)
"""Pairs of curves; a smooth curve is a combination of both and a constant."""
GRID = 801
"""Horizons at which the slope of a curve is tested."""


@dataclass(frozen=True)
class Optimum:
    """The best tested horizon at the last evaluation, in optimizer steps, and a 95 % interval of the optimum.

    A horizon is 1 / (1 - decay).
    """

    best: float
    low: float | None
    """Lower end; None if no shorter horizon is clearly worse."""
    high: float | None
    """Upper end; None if no longer horizon is clearly worse."""
    through: tuple[float, ...] = ()
    """Horizons through which smooth curves narrow the interval; empty if its ends are tested horizons."""

    def __str__(self) -> str:
        tested = f"best tested decay {decay_text(self.best)}"
        best = f"{tested}; the optimum is"
        if self.low is not None and self.high is not None:
            if self.through:
                curves = ", ".join(map(decay_text, self.through))
                ends = f"{_rounded(self.low)} and {_rounded(self.high)}"
                return f"{best} between {ends} on smooth curves through {curves}"
            return f"{best} between {decay_text(self.low)} and {decay_text(self.high)}"
        if self.low is not None:
            return f"{best} above {decay_text(self.low)}; no longer average is clearly worse"
        if self.high is not None:
            return f"{best} below {decay_text(self.high)}; no shorter average is clearly worse"
        return f"{tested}; no other tested decay is clearly worse"


def _rounded(horizon: float) -> str:
    """Format the decay of an estimated horizon: 1 - decay has two significant digits."""
    digits = 1 + max(0, math.ceil(math.log10(horizon)))
    return f"{1 - 1 / horizon:.{digits}f}"


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
    """Estimate the best horizon.

    Returns:
        None with fewer than three horizons, for a metric without a direction, and if a race eliminated averages at this
        evaluation, which then has no values of theirs on all samples.
    """
    points = [point for point in horizons_of(group, rows) if point[1].is_eligible]
    candidates = [horizon for horizon, row in points if row.may_be_best]
    if len(points) < 3 or not candidates:
        return None
    higher = bool(group.higher_is_better(points[0][1].metric))
    if eliminated_at(group, points[0][1].metric, points[0][1].last_step):
        return None
    best, leader = (max if higher else min)(points, key=lambda point: point[1].last.value)
    # An average of the same horizon differs in something else, so it is no end of the interval.
    below = [point for point in points if point[0] < candidates[0]]
    above = [point for point in points if point[0] > candidates[-1]]
    if below and above:
        chosen = (below[-1], (best, leader), above[0])
        names = [row.weights for _, row in chosen]
        moments = moments_of(group, leader.metric, leader.last_step, names)
        if moments is not None and len(moments.weights) == 3:
            horizons = tuple(horizon for horizon, _ in chosen)
            if (ends := _on_smooth_curves(moments, names, horizons)) is not None:
                return Optimum(best, *ends, through=horizons)
    return Optimum(best, below[-1][0] if below else None, above[0][0] if above else None)


def _on_smooth_curves(
    moments: Moments, names: Sequence[str], horizons: Sequence[float]
) -> tuple[float, float] | None:
    """Return the smallest and largest horizon at which a smooth curve may have its minimum; None if all may.

    The curves pass through three averages: the one below the best one, the best one, and the one above it.
    """
    below, best, above = names
    contrasts = [{below: 1.0, best: -1.0}, {above: 1.0, best: -1.0}, {below: 1.0, above: -1.0}]
    (first, a), (second, b), (_, between) = (moments.contrast(contrast) for contrast in contrasts)
    reach = t_quantile(ALPHA, moments.count - 1) if moments.count > 1 else math.nan
    if not all(map(math.isfinite, (a, b, between, reach))):
        return None
    covariance = (a * a + b * b - between * between) / 2
    logs = np.log(np.array(horizons) / horizons[1])
    u = np.linspace(logs[0], logs[2], GRID)
    possible = np.zeros(GRID, dtype=bool)
    for (f, f_slope), (g, g_slope) in SHAPES:
        heights = np.array([[f(end) - f(np.zeros(1))[0], g(end) - g(np.zeros(1))[0]] for end in logs[[0, 2]]])
        # The two coefficients follow from the two differences; the slope is linear in them.
        weights = np.stack([f_slope(u), g_slope(u)], axis=1) @ np.linalg.inv(heights)
        slope = weights @ np.array([first, second])
        variance = (weights[:, 0] * a) ** 2 + (weights[:, 1] * b) ** 2
        variance += 2 * weights[:, 0] * weights[:, 1] * covariance
        possible |= np.abs(slope) <= reach * np.sqrt(np.maximum(variance, 0))
        turns = np.flatnonzero(slope[:-1] * slope[1:] <= 0)
        possible[turns] = possible[turns + 1] = True
    found = np.flatnonzero(possible)
    if not len(found) or (found[0] == 0 and found[-1] == GRID - 1):
        return None
    low, high = horizons[1] * np.exp(u[[found[0], found[-1]]])
    return float(low), float(high)
