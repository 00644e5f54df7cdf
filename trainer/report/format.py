"""Format numbers, names and directions for tables, pictures and the terminal."""

import math

from trainer.report.statistics import Estimate
from trainer.report.verdicts import Score
from trainer.rundir.keys import LIVE

EMPTY_CELL = "-"
MAX_DECIMALS = 6
"""Most decimals of a gap; a gap that needs more is written with an exponent."""
MAX_FIXED = 1e5
"""Errors from this size on are written with an exponent."""
MAX_COUNT = 1_000_000
"""Largest estimated number of samples that is written out."""
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
"""Binary units, each 1024 times the one before."""


def display_name(weights: str) -> str:
    """Return the name of some weights as a reader sees it: `live` or `EMA <name>`."""
    return weights if weights == LIVE else f"EMA {weights}"


def direction_text(higher_is_better: bool | None) -> str:
    """Return the direction of a metric in words; empty without a direction."""
    return "" if higher_is_better is None else f"{'higher' if higher_is_better else 'lower'} is better"


def format_value(number: float | None) -> str:
    """Format a number with about five significant digits; `-` for None."""
    if number is None:
        return EMPTY_CELL
    if number != 0 and math.isfinite(number) and not 1e-3 <= abs(number) < 1e5:
        return f"{number:.3e}"
    return f"{number:.4f}" if abs(number) < 100 else f"{number:.1f}"


def format_mean(score: Score | None) -> str:
    """Format mean and standard deviation over seeds (`1.4431 ± 0.0029`); only the value for a single seed."""
    if score is None or score.sd is None:
        return format_value(score.value if score else None)
    return f"{format_value(score.value)} ± {score.sd:.2g}"


def format_interval(gap: Estimate | None) -> str:
    """Format a gap and its interval (`+0.0521 [0.0460, 0.0582]`) so that half the interval has two digits."""
    if gap is None:
        return EMPTY_CELL
    low, high = gap.interval
    if math.isnan(low) or low == high:  # no interval, or one narrower than the precision of a float
        return _signed(gap.mean)
    reach = (high - low) / 2
    return f"{_rounded(gap.mean, reach, '+')} [{_rounded(low, reach)}, {_rounded(high, reach)}]"


def format_difference(gap: Estimate, plus_minus: str = "±", unit: str = "") -> str:
    """Format a difference and its standard error (`+0.1000 ± 0.0023`) so that the error has two digits.

    Without a standard error, or with one of zero, which allows no test, it is the difference alone (`+0.1000`).

    Args:
        gap: difference of two weights.
        plus_minus: sign in front of the error; another one for terminals without Unicode.
        unit: text behind the error.
    """
    if not (math.isfinite(gap.mean) and math.isfinite(gap.se) and gap.se > 0):
        return _signed(gap.mean)
    return f"{_rounded(gap.mean, gap.se, '+')} {plus_minus} {_rounded(gap.se, gap.se)}{unit}"


def _rounded(number: float, error: float, sign: str = "") -> str:
    """Format a finite number with the decimals with which its error, above 0, has two digits."""
    decimals = 1 - math.floor(math.log10(float(f"{error:.1e}")))  # 0.0996 is 0.10
    if decimals > MAX_DECIMALS or error >= MAX_FIXED:
        digits = math.floor(math.log10(abs(number) or error)) + decimals
        return f"{number:{sign}z.{min(max(digits, 0), 15)}e}"
    return f"{number:{sign}z.{max(decimals, 0)}f}"


def _signed(number: float) -> str:
    return f"{'-' if number < 0 else '+'}{format_value(abs(number))}"


def format_p(p: float) -> str:
    """Format a p-value with two digits; values below 0.0001 are not distinguished."""
    if math.isnan(p):
        return EMPTY_CELL
    return "<0.0001" if p < 1e-4 else f"{p:.2g}"


def format_test(p: float, *adjusted: str) -> str:
    """Format a p-value with what it is adjusted for: `p 0.03 (Holm, 5 averages)`.

    Args:
        p: p-value after the adjustments.
        adjusted: texts of the adjustments; empty ones are left out.
    """
    texts = "; ".join(filter(None, adjusted))
    return f"p {format_p(p)}" + (f" ({texts})" if texts else "")


def holm_text(averages: int) -> str:
    """Name the adjustment of the comparisons with the live weights; empty for a single one."""
    return f"Holm, {averages} averages" if averages > 1 else ""


def format_count(count: float) -> str:
    """Format an estimated number of samples with two significant digits, rounded up."""
    if not count <= MAX_COUNT:
        return f"more than {MAX_COUNT:,}"
    digits = max(0, math.floor(math.log10(max(count, 1))) - 1)
    return f"{math.ceil(count / 10**digits) * 10**digits:,}"


def format_size(number: float) -> str:
    """Format a number of bytes with three digits and a binary unit, such as `7.49 GiB`."""
    unit = 0
    while number >= 999.5 and unit < len(UNITS) - 1:
        number, unit = number / 1024, unit + 1
    if unit == 0:
        return f"{number:.0f} B"
    return f"{number:.{0 if number >= 99.95 else 1 if number >= 9.995 else 2}f} {UNITS[unit]}"
