"""Fixtures of the tests of whole runs."""

import pytest

from tests.integration.commands import Warm
from tests.ranks import RankPool


@pytest.fixture(scope="session")
def warm(ranks: RankPool) -> Warm:
    """`warm(*overrides, cwd=…, ranks=…)`: a run in processes that are there already."""
    return Warm(ranks)
