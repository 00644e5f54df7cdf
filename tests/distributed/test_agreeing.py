"""Errors of one rank on real processes: every rank raises the same one and knows which rank had it first."""

from collections.abc import Callable

import torch.distributed as dist

from tests.ranks import RankPool
from trainer.distributed.processes import agreeing, gather, on_main, raised_on
from trainer.errors import ConfigError


def outcome(work: Callable[[], object]) -> tuple[str, str, int | None]:
    try:
        return "returned", str(work()), None
    except (ConfigError, OSError) as error:
        return type(error).__name__, str(error), raised_on(error)


def check(failing: list[int]) -> list[tuple[str, str, int | None]]:
    """Outcome of each collective on this rank, where the ranks in `failing` have an error."""
    rank = dist.get_rank()

    def block() -> str:
        with agreeing("testing"):
            if rank in failing:
                raise ConfigError(f"no from {rank}")
        return "yes"

    def within_another() -> str:
        with agreeing("testing"):
            try:
                block()
            except ConfigError as error:
                raise ConfigError(f"resume: {error}") from error
        return "yes"

    def local_block() -> str:
        with agreeing("testing", Exception):
            if rank in failing:
                raise OSError(5, f"no disk on {rank}")
        return "yes"

    def main() -> str:
        if 0 in failing:
            raise OSError(5, "no disk")
        return "yes"

    return [outcome(work) for work in (block, within_another, local_block, lambda: on_main(main))]


def test_every_rank_raises_the_error_of_the_first_rank_that_has_one(ranks: RankPool) -> None:
    yes = ("returned", "yes", None)
    assert ranks(2, check, []) == [[yes] * 4] * 2
    assert (
        ranks(3, check, [1, 2])
        == [
            [
                ("ConfigError", "no from 1", 1),
                ("ConfigError", "resume: no from 1", 1),
                ("OSError", "[Errno 5] no disk on 1", 1),
                yes,
            ]
        ]
        * 3
    )
    assert [main for *_, main in ranks(2, check, [0])] == [("OSError", "[Errno 5] no disk", 0)] * 2


def without_other_ranks() -> list[object]:
    return [gather("own"), *check([0])]


def test_without_other_ranks_an_error_is_raised_as_it_is(ranks: RankPool) -> None:
    found = ranks(1, without_other_ranks)[0]
    assert found[0] == ["own"]
    assert [origin for *_, origin in found[1:]] == [None] * 4
