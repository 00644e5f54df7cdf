"""The processes of a run: joining them, and the few collectives that bookkeeping needs.

Bookkeeping travels over gloo on the CPU, so that it never queues behind the device's work.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config import ConfigError, TrainerConfig

Value = TypeVar("Value")

LEAVING_TIMEOUT = timedelta(seconds=20)


@dataclass(frozen=True)
class Processes:
    """This process among all of the run's."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0


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
    """Join the process group; alone, make a group of one, so that every sharding works in one process too."""
    device = choose_device(config.device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=config.timeout_s)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return Processes(dist.get_rank(), dist.get_world_size(), device)


def leave_together() -> bool:
    """Wait, for a bounded time, until every rank is here: torchrun ends all ranks as soon as the first one leaves.

    Without it rank 0 may be ended before it has said what is wrong. Only for a process that is about to leave.

    Returns:
        Whether every rank came.

    Collectives: a barrier, in a group made for it if the run's was not joined yet.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=LEAVING_TIMEOUT)
    try:
        dist.monitored_barrier(timeout=LEAVING_TIMEOUT)
    except RuntimeError:  # the others are in another place; torchrun ends them
        return False
    leave()
    return True


def leave() -> None:
    """Leave the process group if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


class SharedError(ConfigError):
    """Bad input that every rank has been told of; rank 0 speaks for all."""


def on_main(processes: Processes, action: Callable[[], Value]) -> Value:
    """Run `action` on rank 0 and hand its result to every rank.

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
    errors: list[str | None] = [None] * processes.world_size
    dist.all_gather_object(errors, None if error is None else str(error))
    for rank, message in enumerate(errors):
        if message is not None:
            raise SharedError(message if rank == 0 else f"rank {rank}: {message}") from error


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
    dist.all_reduce(values)
    return values
