"""The roll call: a record of where each rank waits, with which a time-out's message names the missing ranks."""

import time
from collections.abc import Callable
from contextlib import suppress
from threading import Thread

import torch.distributed as dist

ASKING_TIMEOUT_S = 5.0
ASKING_PAUSE_S = 0.05
EXPLAINED = "explained"
"""Key that a rank sets when it has printed the cause of a failure."""


class RollCall:
    """Record the places where the ranks wait for each other.

    All ranks pass the same places in the same order, so a rank that passed fewer places is behind the others. This
    class does not make any rank wait: each rank writes its own place into the store of the process group.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        """Start with no rank at any place; only the ranks of this attempt may use `store`."""
        self._store = dist.PrefixStore("roll call", store)
        self._rank = rank
        self._world_size = world_size
        self._passed = 0
        self._answers = True
        self.place = "starting"

    def arrive(self, place: str) -> None:
        """Record that this rank is at the next place."""
        self._passed += 1
        self.place = place
        self._store.set(str(self._rank), f"{self._passed} {place}")

    def others_are_at(self, place: str, patience_s: float) -> bool:
        """Wait until all other ranks are at `place`, for a bounded time; return whether they are.

        This rank is there already. A rank that passed fewer places is seen where it was before. The result is False if
        the store does not answer.
        """
        give_up = time.monotonic() + patience_s
        elsewhere = [rank for rank in range(self._world_size) if rank != self._rank]
        try:
            while elsewhere := [rank for rank in elsewhere if not self._is_at(rank, place)]:
                if time.monotonic() > give_up:
                    return False
                time.sleep(ASKING_PAUSE_S)
        except RuntimeError:  # the store does not answer
            return False
        return True

    def explain(self) -> None:
        """Record that this rank has printed why the run fails, if the store answers within ASKING_TIMEOUT_S."""
        self._ask(lambda: self._store.set(EXPLAINED, ""), ASKING_TIMEOUT_S)

    def is_explained(self, patience_s: float) -> bool:
        """Wait until a rank has printed why the run fails, for a bounded time; return whether one has.

        The result is False at once if the store did not answer an earlier question.
        """
        found: list[str] = []

        def look() -> None:
            give_up = time.monotonic() + patience_s
            while time.monotonic() < give_up:
                if self._store.check([EXPLAINED]):
                    found.append(EXPLAINED)
                    return
                time.sleep(ASKING_PAUSE_S)

        if self._answers:
            self._ask(look, patience_s + ASKING_PAUSE_S)
        return bool(found)

    def missing_ranks(self) -> dict[int, str]:
        """Return the ranks that have not reached this rank's place, each with its last place.

        The result is empty if the store does not answer within ASKING_TIMEOUT_S, for example because its host failed.
        """
        behind: dict[int, str] = {}

        def look() -> None:
            for rank in range(self._world_size):
                passed, place = self._last_seen(rank)
                if passed < self._passed:
                    behind[rank] = place

        self._ask(look, ASKING_TIMEOUT_S)
        return behind.copy()

    def _ask(self, question: Callable[[], object], patience_s: float) -> None:
        """Ask the store in a thread, for a bounded time: a store whose host failed never answers."""

        def ask() -> None:
            with suppress(RuntimeError):  # the store does not answer
                question()

        asking = Thread(target=ask, daemon=True)
        asking.start()
        asking.join(patience_s)
        self._answers = not asking.is_alive()

    def _is_at(self, rank: int, place: str) -> bool:
        passed, last = self._last_seen(rank)
        return last == place and passed >= self._passed

    def _last_seen(self, rank: int) -> tuple[int, str]:
        """Return how many places a rank has passed, and its last place."""
        arrived = self._store.check([str(rank)])
        entry = self._store.get(str(rank)).decode() if arrived else "0 starting"
        passed, _, place = entry.partition(" ")
        return int(passed), place
