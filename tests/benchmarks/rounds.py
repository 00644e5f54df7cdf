"""Several training loops or calls in one process that take turns, and what their times say.

A machine's speed drifts by more than the differences of interest. So nothing is compared across minutes: in each
round everything has its turn, in an order drawn anew, and the ratio of two is the median of their ratios within a
round.
"""

import ctypes
import gc
import json
import math
import os
import platform
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class StepTime:
    """Seconds per step, the mean of one turn."""

    wall: float
    cpu: float
    """Processor time of the loop's own thread: what other processes take does not count, nor do helper threads."""


class Turns:
    """A loop that runs as it always does, in a thread of its own, and is held up between steps.

    Args:
        name: of the loop, in tables.
        loop: takes the gate, and calls it at one and the same point of every step: from one call to the next there is
            one whole step. When the gate answers True the loop ends.
    """

    def __init__(self, name: str, loop: Callable[[Callable[[], bool]], None]) -> None:
        self.name = name
        self._loop = loop
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._left, self._stop, self._ended = 0, False, False
        self._begin = self._taken = StepTime(0.0, 0.0)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def take(self, steps: int) -> StepTime:
        """Let the loop do some steps and wait for them.

        Raises:
            RuntimeError: the loop failed, or ended by itself.
        """
        self._left = steps
        self._go.release()
        self._done.acquire()
        if self._ended:
            raise RuntimeError(f"{self.name}: ended before it was told to") from self._error
        return StepTime(self._taken.wall / steps, self._taken.cpu / steps)

    def close(self) -> None:
        """End the loop.

        Raises:
            RuntimeError: the loop failed on its way out.
        """
        self._stop = True
        self._go.release()
        self._thread.join()
        if self._error is not None:
            raise RuntimeError(f"{self.name}: failed at its end") from self._error

    def _run(self) -> None:
        torch.set_num_threads(1)  # OpenMP keeps this number per thread
        self._await_turn()
        try:
            self._loop(self._gate)
        except BaseException as error:
            self._error = error
        finally:
            self._ended = True
            self._done.release()

    def _gate(self) -> bool:
        self._left -= 1
        if not self._left:
            _wait_for_device()
            now = StepTime(time.perf_counter(), time.thread_time())
            self._taken = StepTime(now.wall - self._begin.wall, now.cpu - self._begin.cpu)
            self._done.release()
            self._await_turn()
        return self._stop

    def _await_turn(self) -> None:
        self._go.acquire()
        # Read after the wait: waking a thread is no part of a step.
        self._begin = StepTime(time.perf_counter(), time.thread_time())


MALLOC = {"M_TRIM_THRESHOLD": (-1, 1 << 30), "M_MMAP_THRESHOLD": (-3, 1 << 25), "M_ARENA_MAX": (-8, 1)}
"""Numbers and values of glibc's malloc.h: what was freed stays with the process, and all threads share it."""


def keep_freed_memory() -> None:
    """Make glibc hand no memory back to the system; call before the loops begin.

    Whether the large tensors at the top of a thread's heap are handed back and paged in anew at every step is a
    matter of how that heap happens to lie: 1,000 to 5,000 page faults a step for one and the same loop, up to 4 % of
    its time. Without effect on other systems.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for number, value in MALLOC.values():
            libc.mallopt(number, value)


def take_turns(loops: Sequence[Turns], rounds: int, steps: int) -> dict[str, list[StepTime]]:
    """Times of each loop, one per round. Tells standard error how far it is, between rounds."""
    times: dict[str, list[StepTime]] = {loop.name: [] for loop in loops}
    shuffled, order = list(loops), random.Random(0)
    for done in range(1, rounds + 1):
        order.shuffle(shuffled)
        for loop in shuffled:
            times[loop.name].append(loop.take(steps))
        print(f"\r{done} of {rounds} rounds", end="" if done < rounds else "\n", file=sys.stderr, flush=True)
    return times


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of the times; what exists already is never looked at again."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def interleave(
    calls: Mapping[str, Callable[[], object]], rounds: int, turn_s: float = 0.01
) -> dict[str, list[float]]:
    """Time calls against each other.

    Args:
        calls: by name; each is called twice, untimed, before the first round.
        rounds: rounds in which every call has its turn, in an order drawn anew.
        turn_s: least length of a turn: a short call is repeated as often as that takes, each call its own number.

    Returns:
        Seconds per call, the mean of a turn, one per round.
    """
    repeats, order, names = {}, random.Random(0), list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    with no_collection():
        for name, call in calls.items():
            call()
            repeats[name] = min(math.ceil(turn_s / seconds(call)), 1000)
        for _ in range(rounds):
            order.shuffle(names)
            for name in names:
                times[name].append(seconds(calls[name], repeats[name]))
    return times


def seconds(call: Callable[[], object], repeats: int = 1) -> float:
    """Wall time per call, until the device has done its work too."""
    _wait_for_device()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait_for_device()
    return (time.perf_counter() - begin) / repeats


def _wait_for_device() -> None:
    """A GPU works after the call that started it has returned: wait for it before the clock is read."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least two values."""
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio(of: Sequence[float], to: Sequence[float]) -> Spread:
    """How many times as long, over rounds."""
    return Spread.of([a / b for a, b in zip(of, to, strict=True)])


def write_json(path: Path, found: dict[str, Any]) -> None:
    """Write the results together with what they were measured on."""
    machine = {
        "machine": platform.machine(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    text = json.dumps({"machine": machine, **found}, indent=2, default=asdict)
    path.write_text(text + "\n", encoding="utf-8")
