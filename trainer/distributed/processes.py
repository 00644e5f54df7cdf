"""Join and leave the process group, exchange small values between ranks, and raise one rank's error on all ranks.

These collectives use gloo on the CPU, so that they never wait for work that is queued on the device.
"""

import gc
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config.schema import TrainerConfig
from trainer.distributed.roll_call import RollCall
from trainer.errors import ConfigError

Value = TypeVar("Value")

MEETING_TIMEOUT = timedelta(seconds=20)
AGREEING = "agreeing that there was no error"
AGREEING_PATIENCE_S = 5.0
FIRST_RETRY_S, MAX_RETRY_S = 0.02, 1.0


@dataclass(frozen=True)
class Processes:
    """This process: its rank, the number of ranks, its device and its part of each batch."""

    rank: int
    world_size: int
    device: torch.device
    timeout: timedelta | None = None
    """Time that the ranks wait for each other (`trainer.timeout_s`); None is torch's default."""
    data_part: tuple[int, int] | None = None
    """Index, from 0, of this rank's part of each batch, and number of parts; None if each rank has its own part."""

    @property
    def data_rank(self) -> int:
        """Index of this rank's part of each batch; the ranks of one tensor-parallel group have the same part."""
        return self.rank if self.data_part is None else self.data_part[0]

    @property
    def data_world_size(self) -> int:
        """Number of parts into which each batch is divided."""
        return self.world_size if self.data_part is None else self.data_part[1]

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0


_roll_call: RollCall | None = None
"""Roll call of this process's group; None without other ranks, and before this process has joined them."""


@contextmanager
def meeting(place: str) -> Iterator[None]:
    """Record the place where this rank waits during the block, for the message of a time-out; no collective."""
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
    """Return the device that `trainer.device` names.

    Raises:
        ConfigError: The name is `cuda` and there is no CUDA device.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("trainer.device: expected a machine with a CUDA device for 'cuda', found none")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def join(config: TrainerConfig) -> Processes:
    """Join the process group of torchrun; without torchrun, make a group of one process.

    With a group of one, every sharding also works in one process.

    Raises:
        ConfigError: The device of `trainer.device` does not exist.
        RuntimeError: Not all ranks arrived within `trainer.timeout_s`.
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
    """Return a part of torchrun's store that no earlier attempt has written to.

    torchrun keeps one store over its restarts, and a rank fails if it reads there the address of a process that has
    ended. The number of restarts cannot identify an attempt, because it may differ between nodes. So rank 0 writes a
    random name of the attempt into the store. Each other rank reads the name and sends a request to rank 0 under it. If
    no answer comes, the name is that of an earlier attempt, and the rank reads again.
    """
    global _roll_call
    own = secrets.token_hex(8)
    if rank == 0:
        attempt = dist.PrefixStore(own, store)
        _roll_call = RollCall(attempt, rank, world_size)
        _roll_call.arrive("joining")
        store.set("attempt", own)
        for other in range(1, world_size):
            attempt.set(f"accepted {attempt.get(f'request {other}').decode()}", "")
        return attempt
    give_up = time.monotonic() + timeout.total_seconds()
    pause_s = FIRST_RETRY_S
    while True:
        attempt = dist.PrefixStore(store.get("attempt").decode(), store)
        attempt.set(f"request {rank}", own)
        if attempt.check([f"accepted {own}"]):
            _roll_call = RollCall(attempt, rank, world_size)
            _roll_call.arrive("joining")
            return attempt
        if time.monotonic() > give_up:
            raise dist.DistStoreError("timeout: rank 0 did not answer")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, MAX_RETRY_S)  # one store must serve thousands of ranks


def meet_at_the_end() -> bool:
    """Wait until every rank is here, at most MEETING_TIMEOUT.

    torchrun ends all ranks as soon as one rank has ended. Without this wait it may end rank 0 before rank 0 has printed
    the error. Call it only directly before `leave`.

    Returns:
        Whether every rank arrived in time.

    Collectives: one barrier, in a new process group if this process has not joined one yet.
    """
    try:
        if not dist.is_initialized():
            _join_launched("gloo", MEETING_TIMEOUT)
        group: Any = dist.group.WORLD
        group.monitored_barrier(MEETING_TIMEOUT)  # torch's function refuses a group that has two backends
    except RuntimeError:  # the others wait elsewhere; torchrun ends them
        return False
    return True


def leave() -> None:
    """Leave the process group if one was joined, after the deletion of the garbage that refers to it.

    Each group has threads of gloo, which end when its last reference is deleted. Such a thread needs the GIL to free
    its last tensor. If the last reference belongs to an object of C++, as DDP's `Reducer`, its deletion keeps the GIL
    while it waits for the thread, so both wait for ever (pytorch issue 56297). If a thread frees its last tensor while
    Python shuts down, the process aborts ("terminate called without an active exception").

    The caller must have no reference to the model any more; else the threads do not end. Waits for collectives that
    were started, at most their time-out.
    """
    global _roll_call
    _roll_call = None
    if dist.is_initialized():
        if "torch.distributed.tensor" in sys.modules:  # else no model was sharded
            _forget_meshes()
        gc.collect()
        dist.destroy_process_group()


def _forget_meshes() -> None:
    """Clear the caches of DTensor, which refer to the meshes of deleted models."""
    # Here, since they import torch's compiler.
    from torch.distributed.tensor._collective_utils import MeshTopoInfo
    from torch.distributed.tensor._redistribute import _gen_transform_infos, clear_redistribute_planner_cache
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()  # the shardings of the results of operators
    _gen_transform_infos.cache_clear()  # the steps from one sharding to another
    clear_redistribute_planner_cache()
    MeshTopoInfo.build_from_mesh.cache_clear()  # sizes and bandwidths of a mesh


def group_apart(timeout: timedelta | None) -> dist.ProcessGroup:
    """Return a new gloo group of all ranks, after every rank has connected to every other.

    torch returns as soon as this rank's own connections are made. If this rank then left the group at once, a rank that
    is still connecting would fail. The time-out is that of its collectives; None is torch's default.

    Collectives: one barrier on the new group.
    """
    group = dist.new_group(backend="gloo", timeout=timeout)
    dist.barrier(group)
    return group


def own_rank() -> int:
    """Return this process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


class RaisedOn(Exception):
    """Cause of an error that every rank raises, with the number of the rank that raised it first."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"raised on rank {rank}")
        self.rank = rank


def raised_on(error: BaseException) -> int | None:
    """Return the rank that first raised an error which all ranks raise; None if only this rank raises it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, RaisedOn):
        cause = cause.__cause__
    return None if cause is None else cause.rank


def previous_error(error: BaseException) -> BaseException | None:
    """Return the earlier error that a traceback of `error` shows above it, or None."""
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@contextmanager
def agreeing(
    place: str,
    errors: type[Exception] = ConfigError,
    *,
    collectives: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Iterator[None]:
    """Raise the same error on every rank if the block raises one of `errors` on any rank.

    If several ranks have an error, all ranks raise the error of the lowest rank. Any other kind of error is raised on
    its own rank only, at once.

    Args:
        place: name of the block in the message of a time-out.
        errors: class of the errors that all ranks raise.
        collectives: whether the block has collectives. Another rank may wait in one for a rank that has an error. So
            that rank waits `AGREEING_PATIENCE_S` for the others to reach the end, then raises its error alone.
        group: group of all ranks that only the calling thread uses; None is the default group, for the main thread.

    Collectives: one object all-gather on `group` at the end of the block; none without other ranks.
    """
    if world_size() == 1:
        yield
        return
    own: Exception | None = None
    with meeting(place) if group is None else nullcontext():
        try:
            yield
        except errors as error:
            own = error
        with meeting(AGREEING) if group is None else nullcontext():
            if own is not None and collectives and not _others_agree_too():
                raise own
            errors_by_rank = gather(None if own is None else (_first_rank(own), own), group)
    first = next(filter(None, errors_by_rank), None)
    if first is not None:
        _raise_everywhere(*first, own)


@contextmanager
def raised_together(place: str) -> Iterator[None]:
    """Raise the same ConfigError on every rank if the block raises one on all of them; no collective without an error.

    A rank whose error the others do not have raises it alone, after `AGREEING_PATIENCE_S`. The message of a time-out
    has `place`, the name of the block, which is equal on all ranks.

    Collectives: one object all-gather after an error that every rank has.
    """
    try:
        yield
    except ConfigError as error:
        if world_size() == 1:
            raise
        with meeting(f"{AGREEING} {place}"):
            if not _others_agree_too(f"{AGREEING} {place}"):
                raise
            rank, first = gather((_first_rank(error), error))[0]
        _raise_everywhere(rank, first, error)


def _others_agree_too(place: str = AGREEING) -> bool:
    """Wait, for a bounded time, until all other ranks are at this place; return False if they do not come."""
    return _roll_call is None or _roll_call.others_are_at(place, AGREEING_PATIENCE_S)


def on_main(work: Callable[[], Value], place: str = "waiting for rank 0") -> Value:
    """Run `work`, which has no collectives, on rank 0; return its result or raise its error on every rank.

    The message of a time-out has `place`, a description of the wait for rank 0.

    Collectives: one object broadcast; none without other ranks.
    """
    if world_size() == 1:
        return work()
    answer: list[Any] = [None, None]
    if own_rank() == 0:
        try:
            answer[0] = work()
        except Exception as error:
            answer[1] = error
    with meeting(place):
        dist.broadcast_object_list(answer, src=0)
    result: Value
    result, failure = answer
    if failure is not None:
        _raise_everywhere(0, failure, failure)
    return result


def _first_rank(error: Exception) -> int:
    rank = raised_on(error)
    return own_rank() if rank is None else rank


def _raise_everywhere(rank: int, error: Exception, own: Exception | None) -> NoReturn:
    """Raise the error that `rank` has sent to every rank; `own` is the error of this rank, if any."""
    if own is not None and _first_rank(own) == rank:
        error = own  # the received copy of this rank's own error has no traceback
    origin = RaisedOn(rank)
    origin.__cause__ = previous_error(error)
    raise error from origin


def gather(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Return the value of every rank, by rank.

    Collectives: one object all-gather on `group` (None: the default group); none without other ranks.
    """
    values: list[Any] = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def mean_over_ranks(value: Tensor) -> float:
    """Return the mean of a 0-dim tensor over the ranks, after the device has computed it.

    Collectives: one all-reduce of one number.
    """
    total = value.detach().double().cpu()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a CPU tensor over the ranks, in place, and return it.

    Collectives: one all-reduce.
    """
    with meeting("joining the values of an evaluation"):
        dist.all_reduce(values)
    return values
