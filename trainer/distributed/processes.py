"""The processes of a run: joining them, and the few collectives that bookkeeping needs.

Bookkeeping travels over gloo on the CPU, so that it never queues behind the device's work.
"""

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config.schema import TrainerConfig
from trainer.distributed.roll_call import RollCall
from trainer.errors import ConfigError

Value = TypeVar("Value")

LEAVING_TIMEOUT = timedelta(seconds=20)
KNOCK_AGAIN_S, KNOCK_AGAIN_MOST_S = 0.02, 1.0


@dataclass(frozen=True)
class Processes:
    """This process among all of the run's."""

    rank: int
    world_size: int
    device: torch.device
    timeout: timedelta | None = None
    """How long the ranks wait for each other (`trainer.timeout_s`); None is what torch takes for it."""
    data_part: tuple[int, int] | None = None
    """Which part of each batch this rank sees, from 0, and the number of parts; None: each rank has its own part."""

    @property
    def data_rank(self) -> int:
        """The part of each batch that this rank sees; ranks of one tensor-parallel group see the same part."""
        return self.rank if self.data_part is None else self.data_part[0]

    @property
    def data_world_size(self) -> int:
        """Number of parts that each batch is cut into."""
        return self.world_size if self.data_part is None else self.data_part[1]

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0


_roll_call: RollCall | None = None
"""The roll call of this process's group; None before it joined other ranks, and without other ranks."""


@contextmanager
def meeting(place: str) -> Iterator[None]:
    """Name what the ranks do together within, for the message of a time-out. No collective of its own."""
    if _roll_call is None:
        yield
        return
    outside = _roll_call.place
    _roll_call.arrive(place)
    yield
    _roll_call.arrive(outside)


def roll_call() -> RollCall | None:
    """Return the roll call of this process's group; None without other ranks."""
    return _roll_call


def choose_device(name: str) -> torch.device:
    """The device named by `trainer.device`.

    Raises:
        ConfigError: `cuda` was asked for and there is none.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("trainer.device: expected a machine with a CUDA device for 'cuda', found none")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def join(config: TrainerConfig) -> Processes:
    """Join the process group; alone, make a group of one, so that every sharding works in one process too.

    Raises:
        ConfigError: there is no such device.
        RuntimeError: not all ranks came within `trainer.timeout_s`.
    """
    device = choose_device(config.device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=config.timeout_s)
    if "RANK" in os.environ:
        _join_launched(backend, timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return Processes(dist.get_rank(), dist.get_world_size(), device, timeout)


def _join_launched(backend: str, timeout: timedelta) -> None:
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    attempt = _store_of_this_attempt(store, rank, world_size, timeout)
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=world_size, timeout=timeout)


def _store_of_this_attempt(
    store: dist.Store, rank: int, world_size: int, timeout: timedelta
) -> dist.PrefixStore:
    """A part of torchrun's store that no earlier attempt has written to.

    torchrun keeps one store over its restarts, and a rank that finds in it the address of one that is gone fails. Nor
    does every node count the same restarts. So rank 0 names the attempt, and the others knock until they are let
    in: a name that nobody answers to is an old one.
    """
    global _roll_call
    own = secrets.token_hex(8)
    if rank == 0:
        attempt = dist.PrefixStore(own, store)
        _roll_call = RollCall(attempt, rank, world_size)
        _roll_call.arrive("joining")
        store.set("attempt", own)
        for other in range(1, world_size):
            attempt.set(f"let in {attempt.get(f'knock {other}').decode()}", "")
        return attempt
    give_up = time.monotonic() + timeout.total_seconds()
    pause_s = KNOCK_AGAIN_S
    while True:
        attempt = dist.PrefixStore(store.get("attempt").decode(), store)
        attempt.set(f"knock {rank}", own)
        if attempt.check([f"let in {own}"]):
            _roll_call = RollCall(attempt, rank, world_size)
            _roll_call.arrive("joining")
            return attempt
        if time.monotonic() > give_up:
            raise dist.DistStoreError("timeout: rank 0 let nobody in")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, KNOCK_AGAIN_MOST_S)  # thousands of ranks ask one store


def leave_together() -> bool:
    """Wait, for a bounded time, until every rank is here: torchrun ends all ranks as soon as the first one leaves.

    Without it rank 0 may be ended before it has said what is wrong. Only for a process that is about to leave.

    Returns:
        Whether every rank came.

    Collectives: a barrier, in a group made for it if the run's was not joined yet.
    """
    try:
        if not dist.is_initialized():
            _join_launched("gloo", LEAVING_TIMEOUT)
        dist.monitored_barrier(timeout=LEAVING_TIMEOUT)
    except RuntimeError:  # the others are in another place; torchrun ends them
        return False
    leave()
    return True


def leave() -> None:
    """Leave the process group if one was joined."""
    global _roll_call
    _roll_call = None
    if dist.is_initialized():
        dist.destroy_process_group()


class SharedError(ConfigError):
    """Bad input that every rank has been told of; rank 0 speaks for all."""


def on_main(processes: Processes, action: Callable[[], Value], place: str = "waiting for rank 0") -> Value:
    """Run `action` on rank 0 and hand its result to every rank; `place` is its name in the message of a time-out.

    Raises:
        SharedError: on every rank, for a ConfigError of `action`. Any other exception is raised as it is on rank 0,
            and the other ranks are told of it in this way, so that nobody waits for rank 0.

    Collectives: one object broadcast.
    """
    answer: list[Any] = [None, None]
    failure: Exception | None = None
    if processes.is_main:
        try:
            answer[0] = action()
        except Exception as error:
            failure = error
            answer[1] = str(error) if isinstance(error, ConfigError) else f"rank 0 failed: {error!r}"
    with meeting(place):
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is None:
        return answer[0]
    if failure is not None and not isinstance(failure, ConfigError):
        raise failure
    raise SharedError(answer[1]) from failure


def together(processes: Processes, action: Callable[[], Value]) -> Value:
    """Run `action` on every rank; if it raises a ConfigError on any, raise the first on all.

    Collectives: those of `action`, and one object all-gather.
    """
    try:
        result = action()
    except ConfigError as error:
        agree(processes, error)
        raise
    agree(processes, None)
    return result


def agree(processes: Processes, error: ConfigError | None) -> None:
    """Raise the first rank's error as a SharedError on every rank if any rank has one.

    Collectives: one object all-gather.
    """
    with meeting("agreeing that there was no error"):
        errors = gather(processes, None if error is None else str(error))
    for rank, message in enumerate(errors):
        if message is not None:
            raise SharedError(message if rank == 0 else f"rank {rank}: {message}") from error


def gather(processes: Processes, value: Value) -> list[Value]:
    """The value of every rank, by rank.

    Collectives: one object all-gather.
    """
    values: list[Any] = [None] * processes.world_size
    dist.all_gather_object(values, value)
    return values


def mean_over_ranks(value: Tensor) -> float:
    """Mean of a 0-dim tensor over the ranks, read by the host.

    Collectives: one all-reduce of one number.
    """
    total = value.detach().double().cpu()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of a CPU tensor over the ranks, in place.

    Collectives: one all-reduce.
    """
    with meeting("joining what an evaluation found"):
        dist.all_reduce(values)
    return values
