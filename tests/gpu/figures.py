"""How a part prints what it found: one JSON line each."""

import json
import sys
from typing import TextIO

from tests.benchmarks.rounds import Spread


def figure(name: str, value: float | str | Spread, unit: str = "", file: TextIO | None = None) -> None:
    """Print one figure; `python -m tests.gpu` adds the name of the card. A spread is a median and its quartiles."""
    line: dict[str, object] = {"figure": name, "value": value, "unit": unit}
    if isinstance(value, Spread):
        line |= {"value": rounded(value.median), "quartiles": [rounded(value.low), rounded(value.high)]}
    elif isinstance(value, float):
        line["value"] = rounded(value)
    print(json.dumps(line), file=file or sys.stdout, flush=True)


def failure(name: str, error: str, file: TextIO | None = None) -> None:
    """Print one error."""
    print(json.dumps({"figure": name, "error": error}), file=file or sys.stdout, flush=True)


def rounded(value: float) -> float:
    """Five significant digits."""
    return float(f"{value:.5g}")
