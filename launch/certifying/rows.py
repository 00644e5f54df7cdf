"""One row of a certificate: a promise, the largest difference from it, and the difference that is allowed."""

import math
from dataclasses import asdict, dataclass
from typing import Any

SHARDED = "sharded = unsharded"
RESUMED = "resumed = uninterrupted"
EXPORTED = "exported = evaluated"
PROFILE = "realised weights = profile"
MERGED = "merge = formula"


@dataclass(frozen=True)
class Row:
    """Result of one check."""

    check: str
    """Name of the check, one of those above."""
    difference: float | None
    """Largest difference, in the unit that `detail` names; None if it was not measured."""
    tolerance: float | None
    detail: str
    """What was compared, where the largest difference is, or why nothing was compared."""
    skipped: bool = False
    """Whether the check does not apply to the run."""

    @property
    def verdict(self) -> str:
        """`ok`, `FAILED` or `skipped`."""
        if self.skipped:
            return "skipped"
        if self.difference is None or self.tolerance is None:
            return "FAILED"
        return "ok" if self.difference <= self.tolerance else "FAILED"  # NaN has failed

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON values; a difference that is not finite becomes null."""
        finite = self.difference if self.difference is not None and math.isfinite(self.difference) else None
        return {**asdict(self), "difference": finite, "verdict": self.verdict}


def skipped(check: str, why: str) -> Row:
    """Return the row of a check that does not apply to the run."""
    return Row(check, None, None, why, skipped=True)


def failed(check: str, why: str) -> Row:
    """Return the row of a check that could not measure a difference, because what it checks has failed."""
    return Row(check, None, None, why)
