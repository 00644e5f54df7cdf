"""What a test is told when one of its processes fails."""

import os

import pytest
import torch
import torch.distributed as dist

from tests import ranks as tested
from tests.ranks import RankPool


def _one_fails_while_the_other_waits() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the cause")
    dist.recv(torch.zeros(1), src=1)


def _one_ends_while_the_other_waits() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.recv(torch.zeros(1), src=1)


def _one_fails_while_the_other_never_answers(rank: int) -> None:
    if rank == 1:
        raise KeyError("the cause")
    dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False).get("what nobody sets")


def _one_never_answers(rank: int) -> None:
    if rank == 1:
        dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False).get("what nobody sets")


def _rank_and_product(factor: int) -> tuple[int, int]:
    return dist.get_rank(), factor * dist.get_world_size()


def test_the_cause_is_told_and_not_what_it_did_to_the_others(ranks: RankPool) -> None:
    with pytest.raises(AssertionError) as told:
        ranks(2, _one_fails_while_the_other_waits)
    assert str(told.value).startswith("rank 1:\n") and "KeyError: 'the cause'" in str(told.value)


def test_a_failure_is_told_while_others_give_no_answer(ranks: RankPool) -> None:
    with pytest.raises(AssertionError, match="KeyError: 'the cause'"):
        ranks.apart(2, _one_fails_while_the_other_never_answers)


def test_a_process_that_is_gone_and_one_that_gives_no_answer_are_named(
    ranks: RankPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError, match="rank 1:\nits process ended with 7"):
        ranks(2, _one_ends_while_the_other_waits)
    assert ranks(2, _rank_and_product, 3) == [(0, 6), (1, 6)]  # by new processes
    monkeypatch.setattr(tested, "APART_TIMEOUT_S", 1)
    with pytest.raises(AssertionError, match="1 of 2 gave no answer in 1 s"):
        ranks.apart(2, _one_never_answers)
