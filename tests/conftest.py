"""Fixtures of all tests."""

import gc
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests import forked
from tests.ranks import RankPool

forked.install()
forked.skip_syncs()

# As in an activated virtual environment, so printed commands begin with `python`.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """`ranks(world_size, function, *args)`: run a function on real gloo processes."""
    pool = RankPool()
    yield pool
    pool.close()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let garbage collections be rare."""
    gc.set_threshold(50_000, 10, 50)


@pytest.fixture(autouse=True, scope="module")
def _collect_and_freeze() -> None:
    """Let garbage collections skip the modules, the tests, and what earlier files left.

    A full collection would visit hundreds of thousands of objects, and each run of a test ends with one.
    """
    gc.collect()
    gc.freeze()


NEEDS_PROCESSES = {"ranks", "warm"}
"""Fixtures that start processes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start processes, which `make quick` leaves out."""
    for item in items:
        if NEEDS_PROCESSES.intersection(getattr(item, "fixturenames", ())) or _starts_processes(item.path):
            item.add_marker("process")


@cache
def _starts_processes(file: Path) -> bool:
    return (
        re.search(r"^(import|from) (subprocess|multiprocessing)", file.read_text(), re.MULTILINE) is not None
    )
