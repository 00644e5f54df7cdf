"""The tests of this folder, by pytest. On the CPU the tests that need a card are skipped."""

import io
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from tests.gpu.figures import figure


def main() -> int:
    """Run the tests and print how many passed, failed and were skipped; returns the exit code."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        # Plugins and settings of the project may be missing where only the tree was copied.
        code = pytest.main(["-q", "-p", "no:cacheprovider", "-rf", "--tb=short", str(Path(__file__).parent)])
    last = printed.getvalue().strip().splitlines()[-1]
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    for what in ("passed", "failed", "error", "skipped"):
        figure(f"behaviour/{what}", counts.get(what, 0), "tests")
    if code:
        print(printed.getvalue()[-6000:], file=sys.stderr)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
