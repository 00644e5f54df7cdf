"""Data that never comes: a worker dies, hangs or raises what cannot be sent. The run ends and names the data."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_sharer
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forked import FURTHER_IMPORTS
from tests.integration.commands import until
from tests.makers import batches_of
from trainer.config.schema import TrainerConfig
from trainer.data.batches import eval_batches
from trainer.distributed.failures import explain, lost_others
from trainer.errors import EXIT_FAILED, ConfigError, DataFailure
from trainer.protocols import Batch

REPOSITORY = Path(__file__).parents[2]


def raise_what_cannot_be_sent() -> None:
    class Odd(Exception):
        pass

    raise Odd("of the user")


class Failing:
    """Ten samples whose reading fails in this way."""

    def __init__(self, fail: Callable[[], object]) -> None:
        self._fail = fail

    def __len__(self) -> int:
        return 10

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        self._fail()
        return {"index": torch.tensor(indices)}


def reading(fail: Callable[[], object], num_workers: int = 1, **choices: Any) -> Iterator[Batch]:
    return batches_of(Failing(fail), 1, 1, 0, 1, 0, 0, 10, num_workers=num_workers, **choices)


def read_error() -> None:
    raise OSError(5, "Input/output error", "/data/0.bin")


@pytest.mark.parametrize(
    ("fail", "kind", "named"),
    [
        (raise_what_cannot_be_sent, ConfigError, "Odd: of the user"),
        (lambda: sys.exit(3), ConfigError, "SystemExit: 3"),
        (read_error, DataFailure, "OSError: [Errno 5] Input/output error: '/data/0.bin'"),
    ],
)
@pytest.mark.timeout(60)
def test_what_a_worker_raises_is_one_line_of_the_main_process(
    fail: Callable[[], object], kind: type[Exception], named: str
) -> None:
    with pytest.raises(kind) as error:
        next(reading(fail))
    assert str(error.value).startswith(f"data: a DataLoader worker failed: {named} (test_data_failures.py:")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.timeout(60, method="thread")  # the default method uses the signal of the deadline
def test_a_batch_that_never_comes_ends_the_wait_before_the_other_ranks_do(num_workers: int) -> None:
    begin = time.monotonic()
    with pytest.raises(DataFailure) as error:
        next(reading(lambda: time.sleep(1000), num_workers, timeout_s=1.0))
    assert time.monotonic() - begin < 30
    assert str(error.value).startswith("data: no batch within 0.9 s (90% of trainer.timeout_s)")


@pytest.mark.timeout(60, method="thread")
def test_an_evaluation_has_the_deadline_too_and_leaves_no_timer() -> None:
    with pytest.raises(DataFailure, match="no batch within"):
        next(eval_batches(Failing(lambda: time.sleep(1000)), 10, 1, 0, 1, 0, timeout_s=0.5))
    next(eval_batches(Failing(lambda: None), 10, 1, 0, 1, 0, timeout_s=0.5))
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


@pytest.mark.timeout(60)
def test_a_worker_that_dies_is_one_line_with_its_rank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RuntimeError) as error:
        next(reading(lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert explain(error.value, TrainerConfig()) == EXIT_FAILED
    assert not lost_others(error.value)
    line = capsys.readouterr().err
    assert line.startswith("error: rank 1: data: DataLoader worker (pid ") and line.count("\n") == 1
    assert line.endswith("is killed by signal: Killed (too little memory?)\n")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("is_pinned", [False, True])
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # torch's thread prints its error
def test_a_worker_that_ends_while_its_batch_is_fetched_is_one_line(
    is_pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_pinned:  # torch's thread pins for an accelerator, which is not here
        monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
        monkeypatch.setattr("torch.accelerator.current_device_index", lambda: 0)
        monkeypatch.setattr("torch.accelerator.set_device_index", lambda _: None)
        monkeypatch.setattr("torch.utils.data._utils.pin_memory.pin_memory", lambda data, _: data)
    calls: list[int] = []

    def close_the_server_of_tensors() -> None:
        calls.append(1)
        if len(calls) == 2:  # it serves the first batch, and the second one is announced all the same
            server: Any = vars(resource_sharer)["_resource_sharer"]
            until(lambda: server._address, lambda: "no batch is announced")
            server._listener.close()

    with pytest.raises(
        DataFailure, match=r"^data: DataLoader worker ended before its batch was read: \w+Error: "
    ):
        # For any device but the CPU batches are pinned; this one needs no accelerator.
        device = torch.device("meta" if is_pinned else "cpu")
        for _ in reading(close_the_server_of_tensors, timeout_s=50.0, device=device):
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
@pytest.mark.timeout(60)
def test_a_worker_that_hangs_ends_with_a_run_that_is_killed() -> None:
    script = """
import os, signal
from tests.unit.test_data_failures import reading
from multiprocessing import active_children
import time
calls = []
batches = reading(lambda: calls and time.sleep(1000) or calls.append(1))
next(batches)
print(active_children()[0].pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env={**os.environ, FURTHER_IMPORTS: "torch"},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    status = Path(f"/proc/{int(done.stdout)}/stat")
    until(lambda: not status.exists() or ") Z " in status.read_text(), lambda: "the worker lives")
