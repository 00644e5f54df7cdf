"""Make the batches of training and evaluation: the samples of a step depend only on the seed and the step.

The training split has n samples, and every epoch has its own random permutation of them. Row j of the global batch of
step s (both from 0) has the global index g = s * global_batch_size + j: it is entry g % n of the permutation of epoch
g // n. So every sample is used exactly once per epoch, and a batch may contain the end of one epoch and the beginning
of the next. The number of processes, the accumulation and an interruption change neither the samples of a step nor
their order in the global batch. A run that goes on with another batch size continues behind the samples that it used.

If the split augments its samples, the seed of a sample is a hash of the run's seed and of g.
"""

import ctypes
import signal
import sys
import threading
import traceback
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from trainer.data.deadline import deadline
from trainer.errors import ConfigError, DataFailure, message_of, place_of
from trainer.protocols import Augments, Batch, Dataset
from trainer.seeding import AUGMENTATION, DATA_ORDER, EVAL_SUBSET, EVALUATION, LOADER, mix, seed_step
from trainer.shell.terminal import STOP_SIGNALS

CPU = torch.device("cpu")
_PR_SET_PDEATHSIG = 1  # prctl(2)


def micro_batch_size(global_batch_size: int, accumulate: int, world: int) -> int:
    """Return the number of samples in one forward of one process.

    Raises:
        ConfigError: The global batch cannot be divided into equal micro-batches.
    """
    if global_batch_size < 1 or global_batch_size % (world * accumulate):
        raise ConfigError(
            f"trainer.global_batch_size: {global_batch_size} is not divisible by {world} processes"
            f" x {accumulate} accumulation steps"
        )
    return global_batch_size // (world * accumulate)


def first_row(global_batch_size: int, accumulate: int, rank: int, world: int) -> int:
    """Return the row in the global batch of the first sample of `rank`; its micro-batches follow one another."""
    return rank * accumulate * micro_batch_size(global_batch_size, accumulate, world)


def _permutation(num_samples: int, seed: int) -> Tensor:
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))


class Rows(list[int]):
    """Indices of the samples of a micro-batch.

    Args:
        indices: index of each sample in the split.
        first: global index of the first sample; those of the others follow.
    """

    def __init__(self, indices: Iterable[int] = (), first: int = 0) -> None:
        super().__init__(indices)
        self.first = first


@dataclass(eq=False)
class GlobalBatchSampler:
    """Sampler of the indices of each micro-batch of one rank, from step `start_step` to the end of the run.

    The global batch of a step has all micro-batches of rank 0 first, then those of rank 1, and so on. Each rank has the
    permutation of one epoch in memory, 8 bytes per sample.

    Raises:
        ConfigError: The global batch cannot be divided into equal micro-batches.
    """

    num_samples: int
    """Number of samples in the training split."""
    global_batch_size: int
    """Samples per step over all ranks."""
    accumulate: int
    """Micro-batches per step and rank."""
    rank: int
    """Rank of this process."""
    world: int
    """Number of processes."""
    seed: int
    """Seed of the run."""
    start_step: int
    """Number of steps that are done already."""
    steps: int
    """Number of steps of the whole run."""
    start_sample: int | None = None
    """Number of samples that these steps used; None if all of them had this global batch size."""

    def __post_init__(self) -> None:
        layout = self.global_batch_size, self.accumulate
        self._micro = micro_batch_size(*layout, self.world)
        self._first_row = first_row(*layout, self.rank, self.world)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return max(0, self.steps - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        done = self.start_step * self.global_batch_size if self.start_sample is None else self.start_sample
        for step in range(self.steps - self.start_step):
            first = done + step * self.global_batch_size + self._first_row
            rows = self._indices(first, self.accumulate * self._micro)
            for begin in range(0, len(rows), self._micro):
                yield Rows(rows[begin : begin + self._micro], first + begin)

    def _indices(self, first: int, count: int) -> list[int]:
        indices: list[int] = []
        while len(indices) < count:
            epoch, offset = divmod(first + len(indices), self.num_samples)
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = _permutation(self.num_samples, mix(DATA_ORDER, self.seed, epoch))
            indices += self._order[offset : offset + count - len(indices)].tolist()
        return indices


class _Augmented:
    """Data set of the augmented samples of a split, for the rows of a `GlobalBatchSampler`."""

    def __init__(self, split: Augments, seed: int) -> None:
        self._split, self._seed = split, seed

    def __getitems__(self, rows: Rows) -> Batch:
        return self._split.augmented(rows, _seeds(self._seed, range(rows.first, rows.first + len(rows))))


def _seeds(seed: int, places: Iterable[int]) -> list[int]:
    return [mix(AUGMENTATION, seed, place) for place in places]


class _InWorker:
    """Data set of a worker process; it returns an error as its batch.

    torch would raise it with the worker's whole traceback as its message, and a message must be one line. An error that
    cannot be sent would be lost, and the run would wait for ever.
    """

    def __init__(self, dataset: "Dataset | _Augmented") -> None:
        self._dataset = dataset

    def __getitems__(self, indices: Rows) -> Batch | Exception:
        try:
            return self._dataset.__getitems__(indices)
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            found = _sendable(error)
            found.add_note(f"In a DataLoader worker:\n{traceback.format_exc()}")
            return found


def _sendable(error: BaseException) -> ConfigError | DataFailure:
    """Return an error of the data set as one line, without the parts that cannot be sent to another process."""
    if isinstance(error, ConfigError):
        return ConfigError(str(error))
    kind = DataFailure if isinstance(error, OSError | MemoryError) else ConfigError
    return kind(
        f"data: a DataLoader worker failed: {type(error).__name__}: {message_of(error)}"
        f" ({place_of(error)}; HYDRA_FULL_ERROR=1 shows the traceback)"
    )


def _start_worker(worker: int) -> None:
    # Schedulers signal the whole process group. The run still finishes its step, and needs its workers for that.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        # A worker that hangs would outlive a run that is killed; the kernel ends it with the thread that started it.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(workers: Sequence[BaseProcess]) -> None:
    """Kill the workers, since they ignore SIGTERM, and wait for them."""
    # torch's handler would raise a RuntimeError, as for a worker that was lost. Both set it in the main thread only.
    in_main_thread = threading.current_thread() is threading.main_thread()
    of_torch = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main_thread else None
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
    if in_main_thread:
        signal.signal(signal.SIGCHLD, of_torch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to the device; the copy is asynchronous from page-locked memory."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _read(
    loader: DataLoader[Batch | Exception], device: torch.device, timeout_s: float
) -> Generator[Batch, None, None]:
    """Yield the batches on the device; end the workers with the generator, after their error, or at Python's exit."""
    workers: list[BaseProcess] = []
    # Python's exit sends SIGTERM to what is left and waits for ever. A traceback keeps the generator alive until then.
    end = Finalize(None, _end, (workers,), exitpriority=0)
    others = active_children()
    try:
        # A worker inherits the mask: a signal before `_start_worker` would end it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS if loader.num_workers else ())
        try:
            batches = iter(loader)
        finally:
            workers += [child for child in active_children() if child not in others]
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        while True:
            with deadline(timeout_s), _reading_from_workers(loader.num_workers):
                batch = next(batches, None)
            if batch is None:
                return
            if isinstance(batch, Exception):
                raise batch
            yield to_device(batch, device)
    finally:
        end()


@contextmanager
def _reading_from_workers(num_workers: int) -> Iterator[None]:
    """Raise a DataFailure if a worker ends in the block while its batch is fetched from it.

    A batch is announced first. Its tensors are then fetched from the worker, which may have ended meanwhile, before
    torch notices it. Where batches are pinned, a thread of torch fetches them, and prints the error itself.
    """
    try:
        yield
    except (OSError, EOFError, RuntimeError) as error:
        # With no workers it is an error of the data set. torch itself names a worker that it has noticed to be lost.
        is_of_others = isinstance(error, RuntimeError) or not num_workers
        if is_of_others and not str(error).startswith("Pin memory thread"):
            raise
        reason = f"{type(error).__name__}: {message_of(error)}".rstrip(": ")
        raise DataFailure(f"data: DataLoader worker ended before its batch was read: {reason}") from error


def _as_is(batch: Any) -> Any:
    return batch


def train_batches(
    dataset: Dataset,
    sampler: GlobalBatchSampler,
    *,
    device: torch.device = CPU,
    num_workers: int = 0,
    timeout_s: float = 0.0,
) -> Generator[Batch, None, None]:
    """Yield the micro-batches of one rank.

    Args:
        dataset: training split; its `__getitems__` makes whole batches, or its `augmented` if it has one, in the worker
            processes if there are any.
        sampler: sampler of the rank's micro-batches.
        device: device of the batches; to any other one than the CPU they are copied from page-locked memory.
        num_workers: number of processes that read batches in advance, until the generator is closed; 0 reads in this
            process.
        timeout_s: `trainer.timeout_s`, which limits the time to read a batch (`trainer.data.deadline`); 0 for no limit.

    Raises:
        ConfigError: A worker's data set has failed.
        DataFailure: A batch did not come in time, or a worker could not read or had no memory.
    """
    source = _Augmented(dataset, sampler.seed) if isinstance(dataset, Augments) else dataset
    loader: DataLoader[Batch | Exception] = DataLoader(
        cast(TorchDataset[Batch | Exception], _InWorker(source) if num_workers else source),
        batch_sampler=sampler,
        collate_fn=_as_is,
        num_workers=num_workers,
        pin_memory=device.type != "cpu",
        worker_init_fn=_start_worker if num_workers else None,
        # The loader draws a seed for its workers. From torch's global generator, this draw would change dropout masks.
        generator=torch.Generator().manual_seed(mix(LOADER, sampler.seed, sampler.rank)),
    )
    return _read(loader, device, timeout_s)


def eval_indices(num_samples: int, eval_samples: int, seed: int) -> Tensor:
    """Return the indices of the evaluation set, int64 `[n]`: the first `eval_samples` of one fixed permutation.

    It is the whole split if `eval_samples` is 0 or exceeds the size of the split. With the same seed, a larger set
    contains every smaller set.
    """
    count = min(eval_samples or num_samples, num_samples)
    return _permutation(num_samples, mix(EVAL_SUBSET, seed))[:count]


def eval_batches(
    dataset: Dataset,
    eval_samples: int,
    batch_size: int,
    rank: int,
    world: int,
    seed: int,
    timeout_s: float = 0.0,
    part: tuple[int, int] | None = None,
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Yield one rank's part of the evaluation set, in batches of one size and the same number on every rank.

    A split that augments its samples gives the same augmented ones each time. A split or a model that draws from
    torch's global generators draws the same numbers for a batch each time; at the end the CPU's is as it was before.

    A forward under FSDP is a collective, so every rank must have the same number of batches. Incomplete batches are
    padded with copies of a sample. The size of the batches is chosen so that there is little padding: on all ranks
    except the last ones, less than one sample per batch.

    Yields:
        The batch on the CPU; bool `[b]`, False for padding; and int64 `[b]`, the positions of its samples in the whole
        evaluation set. Over all ranks, the valid positions are 0 to n - 1, or those of `part`, each once.

    Args:
        dataset: evaluation split.
        eval_samples: number of samples in the evaluation set, 0 for the whole split.
        batch_size: most samples per batch.
        rank: rank of this process.
        world: number of processes.
        seed: seed of the choice of samples.
        timeout_s: as for `train_batches`.
        part: first position and the one after the last, if only these are wanted; None for the whole set.

    Raises:
        DataFailure: A batch did not come in time.
    """
    indices = eval_indices(len(dataset), eval_samples, seed)
    first, last = part or (0, len(indices))
    share = -(-(last - first) // world)
    batches = -(-share // batch_size)
    size = -(-share // batches)
    end = min(first + (rank + 1) * share, last)
    with torch.random.fork_rng(devices=[]):
        for batch in range(batches):
            padded = torch.arange(size) + first + rank * share + batch * size
            positions = padded.clamp(max=end - 1)
            chosen = indices[positions].tolist()
            seed_step(seed, EVALUATION, int(padded[0]))
            with deadline(timeout_s):
                if isinstance(dataset, Augments):
                    read = dataset.augmented(chosen, _seeds(seed, positions.tolist()))
                else:
                    read = dataset.__getitems__(chosen)
            yield read, padded < end, positions
