"""Whether a difference is one: Student's t for paired differences, and the price of looking at several at once.

Two questions are asked of K averages, and each has its own control at ALPHA = 5 %.

*Does it beat the live weights?* K comparisons with one control. The p-values are adjusted by Holm's step-down method
(S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6, 1979): the chance that any
of K averages that are no better is called better stays below ALPHA, whatever the correlation between them. That is
also the chance of naming a false winner, since the winner is one of those called better. Dunnett's test would use the
correlation that the common live weights bring, and gain a few per cent of the interval; with the 2 to 5 seeds that
people can pay for, that correlation cannot be estimated, and equal variances cannot be assumed of decays that differ
a hundredfold in horizon.

*Which averages may be the best?* All but those worse than the best one seen at ALPHA / (K - 1), after J. Hsu
("Constrained simultaneous confidence intervals for multiple comparisons with the best", Ann. Statist. 12, 1984): the
true best is left out only if one of K - 1 others beats it that clearly, so with probability below ALPHA (Bonferroni).

No scipy: its import takes longer than all that is done here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ALPHA = 0.05
NORMAL_FROM = 10_000
"""Degrees of freedom from which Student's t is the normal distribution (to 1e-4 in its quantiles)."""


def t_probability(t: float, df: float) -> float:
    """P(|T| > |t|) of Student's t with `df` degrees of freedom, a whole number or infinity.

    The finite sums of Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.3 and 26.7.4.
    """
    if df >= NORMAL_FROM:
        return math.erfc(abs(t) / math.sqrt(2))
    angle = math.atan(abs(t) / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = int(df) % 2
    total, term = 0.0, cosine if odd else 1.0
    for k in range(odd, int(df) - 1, 2):
        total += term
        term *= (k + 1) / (k + 2) * cosine * cosine
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return min(1.0, max(0.0, 1 - inside))


@lru_cache
def t_quantile(alpha: float, df: float) -> float:
    """The t that |T| exceeds with probability `alpha`, by bisection."""
    low, high = 0.0, 2.0
    while t_probability(high, df) > alpha:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, df) > alpha else (low, middle)
    return high


@dataclass(frozen=True)
class Estimate:
    """A mean difference and how well it is known."""

    mean: float
    se: float
    """Standard error; NaN if there is nothing to estimate it from."""
    df: float
    """Its degrees of freedom; infinite for a large sample."""

    @property
    def p(self) -> float:
        """Two-sided p-value of no difference; NaN where nothing can be said.

        A standard error of zero says nothing: equal differences are a matter of few digits or of too few samples.
        """
        if not (math.isfinite(self.mean) and math.isfinite(self.se) and self.se > 0 and self.df >= 1):
            return math.nan
        return t_probability(self.mean / self.se, self.df)

    @property
    def interval(self) -> tuple[float, float]:
        """Confidence interval of 95 % for this difference alone; NaN where nothing can be said."""
        if math.isnan(self.p):
            return math.nan, math.nan
        reach = t_quantile(ALPHA, self.df) * self.se
        return self.mean - reach, self.mean + reach


def paired_estimate(differences: NDArray[np.float64]) -> Estimate:
    """Of paired differences `[seeds]`, by Student's t over the seeds."""
    count = len(differences)
    if count < 2 or not np.isfinite(differences).all():
        return Estimate(float(np.mean(differences)) if count else math.nan, math.nan, 0)
    # What rounding leaves of equal differences is no spread.
    spread = float(np.std(differences, ddof=1))
    if spread <= 1e-12 * float(np.abs(differences).max()):
        spread = 0.0
    return Estimate(float(np.mean(differences)), spread / math.sqrt(count), count - 1)


def welch_estimate(a: NDArray[np.float64], b: NDArray[np.float64]) -> Estimate:
    """Of mean(a) - mean(b), independent samples of unequal variance (Welch 1947); degrees of freedom rounded down."""
    if min(len(a), len(b)) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Estimate(float(np.mean(a) - np.mean(b)), math.nan, 0)
    u, v = float(np.var(a, ddof=1)) / len(a), float(np.var(b, ddof=1)) / len(b)
    mean = float(np.mean(a) - np.mean(b))
    if u + v == 0:
        return Estimate(mean, 0.0, 1)
    df = (u + v) ** 2 / (u**2 / (len(a) - 1) + v**2 / (len(b) - 1))
    return Estimate(mean, math.sqrt(u + v), max(1, math.floor(df)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the order given: reject those up to ALPHA. NaN is no test and stays NaN."""
    tested = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = list(p_values), 0.0
    for rank, (p, place) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[place] = largest
    return adjusted
