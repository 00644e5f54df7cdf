"""The tests of this folder, by pytest. On the CPU the tests that need a card are skipped."""

import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.gpu.figures import failure, figure

FOLDER = Path(__file__).parent
OPTIONS = (
    "-v",
    "--tb=short",
    "--durations=10",
    "-p",
    "no:cacheprovider",
    # The settings of pyproject.toml name plugins that may be missing here.
    "-c",
    os.devnull,
    f"--rootdir={FOLDER.parents[1]}",
    "-o",
    "faulthandler_timeout=90",
)


class Outcomes:
    """Prints each failure at once, so that those before a time-out are not lost, and counts the rest."""

    def __init__(self) -> None:
        # pytest prints to standard error, the JSON lines have standard output to themselves.
        self.lines = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.counts: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1
        if report.failed:
            failure(f"behaviour/{report.nodeid}", report.longreprtext[-1500:], self.lines)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.counts["failed"] += 1
            failure(f"behaviour/{report.nodeid}", report.longreprtext[-1500:], self.lines)


def main(device: str, part: str) -> int:
    """Run the tests and print how many passed, failed and were skipped; returns the exit code."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    outcomes = Outcomes()
    code = pytest.main([*OPTIONS, str(FOLDER)], plugins=[outcomes])
    for outcome in ("passed", "failed", "skipped"):
        figure(f"{part}/{outcome}", outcomes.counts[outcome], "tests", outcomes.lines)
    return int(code)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
