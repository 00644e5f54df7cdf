"""Real signals, sent by a process to itself: one request to stop, agreed by all ranks at the same step."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.ranks import RankPool
from trainer.config.schema import ShardingConfig
from trainer.distributed.processes import Processes, group_apart
from trainer.distributed.sharding import shard
from trainer.distributed.stop import StopSignal
from trainer.shell.terminal import STOP_SIGNALS


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers_are_put_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_requests_a_stop_and_nothing_else(number: signal.Signals) -> None:
    with StopSignal() as stop:
        assert not stop.requested()
        assert stop.received is None
        send(number)
        assert stop.requested()
        assert stop.requested()
        assert stop.received is number


def test_hangup_stays_ignored_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            send(signal.SIGHUP)
            assert not stop.requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_same_request_delivered_twice_counts_once() -> None:
    with StopSignal(repeat_after_s=1e6) as stop:
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert stop.requested()


def test_second_interrupt_acts_as_without_us() -> None:
    # A job in the background of a shell inherits SIGINT as ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _interrupt_twice()
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt_twice() -> None:
    with StopSignal(repeat_after_s=0) as stop:
        send(signal.SIGUSR2)
        send(signal.SIGUSR2)
        send(signal.SIGHUP)  # the kernel and a shell send it both
        send(signal.SIGHUP)
        assert stop.requested()
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_second_sigterm_ends_the_process() -> None:
    code = (
        "import os, signal\n"
        "from trainer.distributed.stop import StopSignal\n"
        "with StopSignal(repeat_after_s=0) as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('first', stop.requested(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('second', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "first True\n"
    assert done.returncode == -signal.SIGTERM


def _steps_until_stop(signalled_rank: int, signalled_step: int, number: int) -> tuple[int, bool]:
    with StopSignal() as stop:
        for step in range(1, 20):
            if dist.get_rank() == signalled_rank and step == signalled_step:
                send(signal.Signals(number))
            if stop.requested():
                return step, stop.received is not None
    return 0, False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize("world_size", [2, 4])
def test_signal_to_one_rank_stops_all_at_the_same_step(
    ranks: RankPool, world_size: int, number: signal.Signals
) -> None:
    last = world_size - 1
    replies = ranks(world_size, _steps_until_stop, last, 5, int(number))
    # The vote of step 5 is read at step 6.
    assert replies == [(6, rank == last) for rank in range(world_size)]


def _signals_at_different_steps() -> int:
    with StopSignal() as stop:
        for step in range(1, 20):
            if step == 3 + dist.get_rank():
                send(signal.SIGTERM)
            if stop.requested():
                return step
    return 0


def test_signals_that_arrive_at_different_steps_stop_all_at_the_same_step(ranks: RankPool) -> None:
    assert ranks(2, _signals_at_different_steps) == [4, 4]


def _no_signal() -> list[bool]:
    with StopSignal() as stop:
        return [stop.requested() for _ in range(5)]


def test_without_a_signal_nobody_stops(ranks: RankPool) -> None:
    assert ranks(2, _no_signal) == [[False] * 5] * 2


def _error_on_one_rank() -> str:
    try:
        with StopSignal() as stop:
            stop.requested()
            if dist.get_rank() == 1:
                stop.requested()
                raise KeyError("the loop's own error")
    except KeyError as error:
        return str(error)
    return "no error"


def test_error_inside_is_not_hidden_by_waiting_for_the_vote(ranks: RankPool) -> None:
    assert ranks(2, _error_on_one_rank) == ["no error", '"the loop\'s own error"']


def _timeouts_of_own_groups() -> set[timedelta]:
    """Of the groups that a run makes besides its default one, as their backends hold them."""
    processes = Processes(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), timedelta(seconds=17))
    config = ShardingConfig(strategy="hsdp", replicate=2)
    network = shard(lambda: nn.Linear(2, 2), config, processes, on_meta=False, seed=0)
    weight: Any = network.module.weight
    mesh = weight.device_mesh
    with StopSignal(timeout_s=17) as stop:
        groups = [*mesh.get_all_groups(), stop._group]
        return {group._get_backend(torch.device("cpu")).options._timeout for group in groups}


def test_no_group_of_a_run_waits_longer_than_the_run_was_told_to(ranks: RankPool) -> None:
    assert ranks(4, _timeouts_of_own_groups) == [{timedelta(seconds=17)}] * 4


def _waits_for_rank_1(come: Path) -> bool:
    """Whether rank 1 had made its connections when this rank got its group."""
    barrier = dist.barrier

    def noted(*group: Any) -> None:
        come.touch()
        barrier(*group)

    with patch("torch.distributed.barrier", noted if dist.get_rank() == 1 else barrier):
        group_apart(None)
    return come.exists()


def test_no_rank_gets_a_group_apart_before_all_have_connected(ranks: RankPool, tmp_path: Path) -> None:
    """A rank that left its group at once failed those that were still connecting."""
    assert ranks(2, _waits_for_rank_1, tmp_path / "come") == [True, True]


def _saves_by_the_clock(never: float) -> list[bool]:
    """Rank 0 would save after every step, the other ranks never."""
    with StopSignal(save_after_s=0.0 if dist.get_rank() == 0 else never) as stop:
        return [stop.requested() or stop.save_requested for _ in range(6)]


def test_all_ranks_save_after_the_same_step_by_the_clock_of_rank_0(ranks: RankPool) -> None:
    # A vote is read one step later, and the next one begins with it.
    assert ranks(2, _saves_by_the_clock, 1e9) == [[False, True, True, True, True, True]] * 2


def test_one_process_saves_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("trainer.distributed.stop.time.monotonic", lambda: clock[-1])
    saved = []
    with StopSignal(save_after_s=60) as stop:
        for now in (1000.0, 1059.0, 1060.0, 1061.0, 1119.0, 1130.0):
            clock.append(now)
            assert not stop.requested()
            saved.append(stop.save_requested)
    assert saved == [False, False, True, False, False, True]
