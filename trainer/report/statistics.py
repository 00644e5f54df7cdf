"""Significance tests: Student's t for paired differences, and corrections for several comparisons.

Three questions are asked about K averages. Each has its own error rate ALPHA = 5 %.

*Which averages beat the live weights?* These are K comparisons with one control. The p-values are adjusted by Holm's
step-down method (S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6, 1979): the
probability that any average is wrongly called better stays below ALPHA, for any correlation between the averages. The
probability of a false winner is therefore below ALPHA too, because the winner must be called better. Dunnett's test
would use the correlation caused by the common live weights and make the intervals a few per cent narrower. But 2 to 5
seeds are too few to estimate that correlation, and averages whose horizons differ a hundredfold do not have equal
variances.

*Which averages may be the best?* All except those that are worse than the best observed one at level ALPHA / (K - 1),
after J. Hsu ("Constrained simultaneous confidence intervals for multiple comparisons with the best", Ann. Statist. 12,
1984). The true best is excluded only if one of the K - 1 others beats it at that level, so with probability below
ALPHA (Bonferroni); the tests are two-sided, so with probability below ALPHA / 2. If the best observed average beats
each other one at level ALPHA, it is the best, and all others are excluded. A claim that needs all of several tests pays
nothing for their number, also after a selection (S. Gutmann and Z. Maymin, "Is the selected population the best?", Ann.
Statist. 15, 1987), and excludes the true best with probability below ALPHA / 2 once more.

*Which pairs of all weights differ?* Holm's method over all pairs.

Two weights are compared by their difference on each sample of a run, or on each seed. `python -m tests.nulls` simulates
how often each verdict is wrong and how often it finds a difference.

scipy is not used because its import takes longer than all of these computations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ALPHA = 0.05
NORMAL_FROM = 10_000
"""Degrees of freedom from which the normal distribution replaces Student's t (quantiles agree to 1e-4)."""


def t_probability(t: float, df: float) -> float:
    """Return P(|T| > |t|) for Student's t with `df` degrees of freedom, a whole number or infinity.

    Uses the finite sums of Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.3 and 26.7.4.
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


def _t_density(t: float, df: float) -> float:
    """Return the density of Student's t at `t`."""
    if df >= NORMAL_FROM:
        return math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    return scale * (1 + t * t / df) ** (-(df + 1) / 2)


@lru_cache
def t_quantile(alpha: float, df: float) -> float:
    """Return the t that |T| exceeds with probability `alpha`, by Newton's method.

    The probability is convex in t, so the steps from a smaller t only grow towards the solution. The quantile of the
    normal distribution is smaller, and near where `df` is large and a probability costs most.
    """
    t, step = (0.0 if df >= NORMAL_FROM else t_quantile(alpha, math.inf)), math.inf
    while step > 1e-9 * t:
        step = (t_probability(t, df) - alpha) / (2 * _t_density(t, df))
        t += step
    return t


@dataclass(frozen=True)
class Estimate:
    """A mean difference with its standard error."""

    mean: float
    se: float
    """Standard error of the mean; NaN if it cannot be estimated."""
    df: float
    """Degrees of freedom of the standard error; infinite for a large sample."""
    runs: int = 1
    """Number of runs of one seed whose mean it is; 1 over several seeds too."""

    @property
    def p(self) -> float:
        """Two-sided p-value of the hypothesis "no difference"; NaN if it cannot be tested.

        A standard error of zero allows no test: differences are equal because of rounding or too few samples.
        """
        if not (math.isfinite(self.mean) and math.isfinite(self.se) and self.se > 0 and self.df >= 1):
            return math.nan
        return t_probability(self.mean / self.se, self.df)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval, not adjusted for other comparisons; NaN if there is no p-value."""
        if math.isnan(self.p):
            return math.nan, math.nan
        reach = t_quantile(ALPHA, self.df) * self.se
        return self.mean - reach, self.mean + reach


def paired_estimate(differences: NDArray[np.float64]) -> Estimate:
    """Estimate the mean of paired differences `[seeds]` by Student's t over the seeds."""
    count = len(differences)
    if count < 2 or not np.isfinite(differences).all():
        return Estimate(float(np.mean(differences)) if count else math.nan, math.nan, 0)
    return Estimate(float(np.mean(differences)), spread(differences) / math.sqrt(count), count - 1)


def one_seed_estimate(gaps: NDArray[np.float64], errors: NDArray[np.float64], samples: float) -> Estimate:
    """Estimate the mean gap of the runs of one seed, of which forks of one run are an example.

    Its variance is that over the samples plus that over the runs, with the degrees of freedom of Welch, rounded down.
    These are too many where two or three runs are alike by chance, so Student's t over the runs must be as clear: the
    less certain of the two is returned. `python -m tests.nulls` has the error rate.

    Args:
        gaps: gap of each run `[runs]`.
        errors: its standard error over the samples `[runs]`. The runs share these samples, so the error of the mean is
            at most the mean of the errors.
        samples: number of samples.
    """
    over_runs, u = replace(paired_estimate(gaps), runs=len(gaps)), float(np.mean(errors))
    v, both = over_runs.se, replace(over_runs, se=u if math.isfinite(u) else math.nan, df=samples - 1)
    if not (both.se >= 0 and v > 0 and samples > 1):
        return both
    se = math.hypot(u, v)
    df = 1 / ((u / se) ** 4 / (samples - 1) + (v / se) ** 4 / over_runs.df)
    both = replace(both, se=se, df=df if df >= NORMAL_FROM else math.floor(df + 1e-9))
    return over_runs if over_runs.p > both.p else both


def spread(values: NDArray[np.float64]) -> float:
    """Return the standard deviation; 0 for equal values, which can show a tiny one by rounding."""
    sd = float(np.std(values, ddof=1))
    return sd if sd > 1e-12 * float(np.abs(values).max()) else 0.0


def welch_estimate(a: NDArray[np.float64], b: NDArray[np.float64]) -> Estimate:
    """Estimate mean(a) - mean(b) for independent samples of unequal variance (Welch 1947).

    The degrees of freedom are rounded down.
    """
    if min(len(a), len(b)) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Estimate(float(np.mean(a) - np.mean(b)), math.nan, 0)
    mean = float(np.mean(a) - np.mean(b))
    u, v = spread(a) / math.sqrt(len(a)), spread(b) / math.sqrt(len(b))
    se = math.hypot(u, v)
    if se == 0:
        return Estimate(mean, 0.0, 1)
    df = 1 / ((u / se) ** 4 / (len(a) - 1) + (v / se) ** 4 / (len(b) - 1))
    return Estimate(mean, se, max(1, math.floor(df)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's method, in the given order; NaN means "not tested" and stays NaN."""
    tested = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = list(p_values), 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[index] = largest
    return adjusted
