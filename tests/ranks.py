"""Real gloo processes for tests: started once, given one function after another.

Starting a process that imports torch takes seconds, so a pool of workers lives as long as the test session, and they
are forks of the server of `tests.forked`. Every call makes a new process group over the first `world_size` of them, on
a file store in a fresh folder.
"""

import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing import current_process
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from tests.forked import FURTHER_IMPORTS, REPOSITORY

COLLECTIVE_TIMEOUT_S = 30
CALL_TIMEOUT_S = 120
APART_TIMEOUT_S = 240
"""Those are whole runs."""


def work(descriptor: int) -> None:
    """Carry out one job after another, as a process of the pool."""
    import torch

    connection = Connection(descriptor)
    current_process().authkey = connection.recv_bytes()  # with it tensors are fetched from one another
    gc.freeze()  # modules are no garbage, and hundreds of thousands of objects
    torch.set_num_threads(1)
    while (job := connection.recv()) is not None:
        try:
            connection.send((True, _run(*job)))
        except BaseException:
            # Said before the group is left, from which the other ranks' errors follow; who asked ends this process.
            connection.send((False, traceback.format_exc()))


def _run(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, world: int, folder: str | None
) -> Any:
    import torch
    import torch.distributed as dist

    from trainer.distributed.processes import leave

    torch.manual_seed(0)
    if folder is not None:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        )
        dist.barrier()  # a rank that leaves while others still connect fails them
    result = function(*args)
    if folder is not None and dist.is_initialized():
        dist.barrier()
    leave()
    gc.collect()
    gc.freeze()  # what this call has imported, which the collections of the next one need not visit
    return result


def threads_of_gloo() -> int:
    """How many threads gloo has in this process: one for each group that is alive."""
    names: list[str] = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # the thread has ended meanwhile
            names.append(path.read_text())
    return sum(name.startswith("gloo") for name in names)


class RankPool:
    """Worker processes that become the ranks of one process group per call."""

    def __init__(self) -> None:
        self._workers: list[tuple[subprocess.Popen[bytes], Connection]] = []

    def __call__(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `function(*args)` on ranks 0 .. world_size - 1 and return their results by rank.

        `function` is a module-level function of a test module; arguments and results are pickled.

        Raises:
            AssertionError: with the traceback of the first rank that fails, as soon as it does, or at the time-out.
        """
        folder = tempfile.mkdtemp(prefix="ranks-")
        try:
            return self._each(folder, [(function, args)] * world_size, CALL_TIMEOUT_S)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def apart(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `function(rank, *args)` in as many processes that joined nobody yet; the rest is as for a call."""
        jobs = [(function, (rank, *args)) for rank in range(world_size)]
        return self._each(None, jobs, APART_TIMEOUT_S)

    def _each(
        self, folder: str | None, jobs: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], timeout_s: float
    ) -> list[Any]:
        world_size = len(jobs)
        self._grow(world_size)
        crew = self._workers[:world_size]
        try:
            for rank, (_, connection) in enumerate(crew):
                connection.send((*jobs[rank], rank, world_size, folder))
            return self._replies(world_size, timeout_s)
        except BaseException:
            self.close()
            raise

    def _replies(self, world_size: int, timeout_s: float) -> list[Any]:
        """Of all ranks; of whichever comes first, for a rank that failed keeps the others waiting."""
        awaited = {connection: rank for rank, (_, connection) in enumerate(self._workers[:world_size])}
        replies: dict[int, Any] = {}
        until = time.monotonic() + timeout_s
        while awaited:
            ready = wait(list(awaited), until - time.monotonic())
            if not ready:
                silent = ", ".join(map(str, awaited.values()))
                raise AssertionError(f"rank {silent} of {world_size} gave no answer in {timeout_s} s")
            failures = []
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = awaited.pop(connection)
                try:
                    good, replies[rank] = connection.recv()
                except EOFError:
                    worker = self._workers[rank][0]
                    good, replies[rank] = False, f"its process ended with {worker.wait()}"
                if not good:
                    failures.append(f"rank {rank}:\n{replies[rank]}")
            if failures:
                raise AssertionError("\n".join(failures))
        return [replies[rank] for rank in range(world_size)]

    def _grow(self, count: int) -> None:
        while len(self._workers) < count:
            ours, theirs = Pipe()
            with theirs:
                worker = subprocess.Popen(
                    [sys.executable, "-c", f"from tests.ranks import work; work({theirs.fileno()})"],
                    cwd=REPOSITORY,
                    env={**os.environ, "PYTHONPATH": str(REPOSITORY), FURTHER_IMPORTS: "torch"},
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
            ours.send_bytes(bytes(current_process().authkey))
            self._workers.append((worker, ours))

    def close(self) -> None:
        """End all workers; the next call starts new ones."""
        for worker, connection in self._workers:
            worker.kill()
            worker.wait()
            connection.close()
        self._workers = []
