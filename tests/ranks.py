"""Real gloo processes for tests: started once, given one function after another.

Starting a process that imports torch takes seconds, so a pool of workers lives as long as the test session;
every call makes a new process group over the first `world_size` of them, on a file store in a fresh folder.
"""

import gc
import multiprocessing
import shutil
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

COLLECTIVE_TIMEOUT_S = 30
CALL_TIMEOUT_S = 120


def _work(connection: Connection) -> None:
    gc.disable()  # modules are no garbage, and there are half a million objects in them
    import torch

    gc.enable()
    torch.set_num_threads(1)
    while (job := connection.recv()) is not None:
        connection.send(_run(*job))


def _run(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, world: int, folder: str | None
) -> tuple[bool, Any]:
    import torch
    import torch.distributed as dist

    torch.manual_seed(0)
    try:
        if folder is not None:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
            )
        return True, function(*args)
    except BaseException:
        return False, traceback.format_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class RankPool:
    """Worker processes that become the ranks of one process group per call."""

    def __init__(self) -> None:
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def __call__(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `function(*args)` on ranks 0 .. world_size - 1 and return their results by rank.

        `function` is a module-level function of a test module; arguments and results are pickled.

        Raises:
            AssertionError: with the traceback of the first rank that failed, or at the time-out.
        """
        folder = tempfile.mkdtemp(prefix="ranks-")
        try:
            return self._each(folder, [(function, args)] * world_size)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def apart(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `function(rank, *args)` in as many processes that joined nobody yet; the rest is as for a call."""
        return self._each(None, [(function, (rank, *args)) for rank in range(world_size)])

    def _each(
        self, folder: str | None, jobs: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]
    ) -> list[Any]:
        world_size = len(jobs)
        self._grow(world_size)
        crew = self._workers[:world_size]
        try:
            for rank, (_, connection) in enumerate(crew):
                connection.send((*jobs[rank], rank, world_size, folder))
            replies = []
            for rank, (_, connection) in enumerate(crew):
                if not connection.poll(CALL_TIMEOUT_S):
                    raise AssertionError(f"rank {rank} of {world_size} gave no answer in {CALL_TIMEOUT_S} s")
                replies.append(connection.recv())
        except BaseException:
            self.close()
            raise
        failures = [f"rank {rank}:\n{reply}" for rank, (good, reply) in enumerate(replies) if not good]
        if failures:
            self.close()
            raise AssertionError("\n".join(failures))
        return [reply for _, reply in replies]

    def _grow(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self._workers) < count:
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs,), daemon=True)
            worker.start()
            self._workers.append((worker, ours))

    def close(self) -> None:
        """End all workers; the next call starts new ones."""
        for worker, connection in self._workers:
            worker.kill()
            worker.join()
            connection.close()
        self._workers = []
