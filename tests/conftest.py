"""Fixtures of all tests."""

from collections.abc import Iterator

import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """`ranks(world_size, function, *args)`: run a function on real gloo processes."""
    pool = RankPool()
    yield pool
    pool.close()
