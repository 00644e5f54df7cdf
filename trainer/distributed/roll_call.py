"""The roll call: a record of where each rank waits, with which a time-out's message names the missing ranks."""

from threading import Thread

import torch.distributed as dist

ASKING_TIMEOUT_S = 5.0


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
        self.place = "starting"

    def arrive(self, place: str) -> None:
        """Record that this rank is at the next place."""
        self._passed += 1
        self.place = place
        self._store.set(str(self._rank), f"{self._passed} {place}")

    def missing_ranks(self) -> dict[int, str]:
        """Return the ranks that have not reached this rank's place, each with its last place.

        The result is empty if the store does not answer within ASKING_TIMEOUT_S, for example because its host failed.
        """
        behind: dict[int, str] = {}
        asking = Thread(target=self._ask, args=(behind,), daemon=True)
        asking.start()
        asking.join(ASKING_TIMEOUT_S)
        return dict(sorted(behind.copy().items()))

    def _ask(self, behind: dict[int, str]) -> None:
        try:
            for rank in range(self._world_size):
                arrived = self._store.check([str(rank)])
                entry = self._store.get(str(rank)).decode() if arrived else "0 starting"
                passed, _, place = entry.partition(" ")
                if int(passed) < self._passed:
                    behind[rank] = place
        except RuntimeError:  # the store does not answer
            return
