"""What the tests of whole runs rely on: ports that stay free, and processes that keep nothing of an earlier call."""

import gc
import socket
import weakref
from pathlib import Path

import pytest

from tests.integration.commands import Warm, free_port
from tests.ranks import RankPool


class Node:
    """Refers to itself."""

    def __init__(self) -> None:
        self.own = self


_left: list[weakref.ref[Node]] = []


def _leave_garbage(rank: int) -> None:
    _left.append(weakref.ref(Node()))


def _is_gone(rank: int) -> bool:
    gc.collect()
    return _left[-1]() is None


def test_what_an_earlier_call_left_behind_is_not_kept(ranks: RankPool, warm: Warm, tmp_path: Path) -> None:
    warm("trainer.steps=none", cwd=tmp_path, code=2)  # what it imports is collected over, else on the way
    ranks.apart(1, _leave_garbage)
    warm("trainer.steps=none", cwd=tmp_path, code=2)
    assert ranks.apart(1, _is_gone) == [True]


def test_a_free_port_is_none_that_a_connection_gets_and_each_is_given_once() -> None:
    first = free_port()
    with socket.socket() as other:
        other.bind(("localhost", first + 1))
        second = free_port()
    assert second not in (first, first + 1)
    try:
        low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except FileNotFoundError:
        pytest.skip("not Linux: its range for connections is not to be read")
    assert not any(low <= port <= high for port in (first, second))
