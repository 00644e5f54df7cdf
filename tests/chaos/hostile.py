"""Give hostile checkpoints, records and sweeps to all readers: the unit tests of untrusted files, counted.

They hold pickles that would run code, archives that explode, paths that lead outside, links, devices and pipes.
"""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

from tests.chaos.ledger import Counts, Trial
from tests.integration.commands import REPOSITORY, environment

TIMEOUT_S = 600


def read_hostile(_: Random, *, file: str) -> Counts:
    """Run one file of unit tests; a test that passes is an attack that did no harm."""
    report = Path("report.xml").absolute()
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", file]
    subprocess.run(
        words, cwd=REPOSITORY, env=environment(), capture_output=True, timeout=TIMEOUT_S, check=False
    )
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [
        case.get("name", "")
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    harmless = len(cases) - len(failed) - skipped
    return Counts({"harmless": harmless, "skipped": skipped, "wrong": len(failed)}, failed)


def trials(count: int, references: Path, short: bool) -> Iterator[Trial]:
    """Yield one trial per file of unit tests; none in the short form, as `make test` runs them anyway."""
    files = [] if short else sorted((REPOSITORY / "tests" / "unit").glob("test_*_untrusted.py"))
    for file in files[:count]:
        kind = file.stem.removeprefix("test_").removesuffix("_untrusted")
        yield Trial("hostile", f"hostile files: {kind}", file.name, partial(read_hostile, file=str(file)))
