"""The project's command lines: in processes of their own, or in those that the tests keep.

Starting torch costs a process more than a run of a test does. Where a test is about the numbers of a run and not about
how it is started, signalled or ended, `Warm` carries it out in gloo processes that are there already.
"""

import errno
import io
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    chdir,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
)
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed import TCPStore

from tests.forked import WITHOUT_PICTURES
from tests.ranks import RankPool
from trainer.checkpoint.store import load_checkpoint, newest_checkpoint, stored_tensors

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 240

TIMING_PREFIXES = ("time/", "throughput/", "mem/")
"""Metrics that no two runs share."""


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with the tree importable, one thread, and nothing of an enclosing torchrun.

    A run in a fork draws no pictures, which are half of the time of a small one; `{WITHOUT_PICTURES: ""}` has them.
    """
    kept = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    }
    own = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "160", WITHOUT_PICTURES: "1"}
    return kept | own | dict(extra or {})


def command(*arguments: str, ranks: int = 1, restarts: int = 0, module: str = "trainer") -> list[str]:
    """`python -m trainer …` or another module.

    Several ranks are under torchrun, which restarts them at most `restarts` times.
    """
    assert ranks > 1 or not restarts
    if ranks == 1:
        return [sys.executable, "-m", module, *arguments]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, f"--max-restarts={restarts}", "-m", module, *arguments]


def trainer(
    *overrides: str, cwd: Path, ranks: int = 1, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run the trainer to its end and return what it printed."""
    return run_to_end(command(*overrides, ranks=ranks), cwd=cwd, check=check)


def run_to_end(
    words: Sequence[str], *, cwd: Path, check: bool = True, extra: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run any command line to its end, in `environment`; a failure is one of the test unless `check` is off.

    Commands of this project begin in a fork of a process that has imported torch (`tests.forked`).
    """
    done = subprocess.run(
        words, cwd=cwd, env=environment(extra), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if check:
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


_FIRST_PORT, _PORTS = 16384, 16384
_ports = (_FIRST_PORT + (os.getpid() * 64 + k) % _PORTS for k in range(_PORTS))


def free_port() -> int:
    """A port of this machine that nobody listens to, and that no connection is given before it is used.

    Port 0 would be one of those that connections get (from 32768 on Linux). Each process looks in a place of its own.
    """
    for port in _ports:
        with socket.socket() as probe:
            try:
                probe.bind(("localhost", port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            return port
    raise AssertionError("expected a free port, found none")


def train(overrides: Sequence[str], composed: bytes | None = None) -> int:
    """What `python -m trainer …` does, in this process; with `composed` only after the configuration was composed."""
    from trainer.cli import run_command
    from trainer.config.compose import compose, overrides_in
    from trainer.config.text import readable
    from trainer.run import run

    def carry_out() -> int:
        if composed is None:
            return run(*compose(list(overrides)))
        cfg = pickle.loads(composed)
        for key, path in _folders(overrides):
            cfg[key] = path
        return run(cfg, overrides_in(readable(overrides)))

    return run_command(carry_out)


def _folders(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """The overrides that name the directory of a run, where that is a plain path."""
    found = (re.fullmatch(r"(run_dir|resume)=([\w./-]+)", override) for override in overrides)
    return [(match[1], match[2]) for match in found if match and match[2] != "null"]


@cache
def _composed(overrides: tuple[str, ...]) -> bytes | None:
    """The pickled configuration of a command line. None if it is refused or searches folders, which a rank does itself.

    Composing takes a third of the time of a small run.
    """
    from trainer.config.compose import compose
    from trainer.errors import ConfigError

    if any(override.startswith(("-", "hydra.", "resume.")) for override in overrides):
        return None
    try:
        return pickle.dumps(compose(list(overrides))[0])
    except ConfigError:
        return None


class Warm:
    """Runs in the processes of a pool what `python -m trainer …` runs, alone or joined as torchrun joins them."""

    def __init__(self, pool: RankPool) -> None:
        self._pool = pool
        self._calls = 0

    def __call__(
        self,
        *overrides: str,
        cwd: Path,
        ranks: int = 1,
        report: bool = False,
        code: int = 0,
        within: Callable[[int], AbstractContextManager[object]] = nullcontext,
        main: Callable[[Sequence[str]], int] = train,
    ) -> str:
        """Carry the run out to its end, which must be with this exit code; what all ranks printed.

        Most of a small run's time would go into its pictures, so they are drawn only where a `report` is looked at.
        Each rank works within a context of its own, made in it by `within(rank)`. `main` may be another command.
        """
        self._calls += 1
        if main is train:
            others = (o for o in overrides if not _folders([o]))
            main = partial(train, composed=_composed(tuple(others)))
        store = TCPStore(
            "localhost", 0, is_master=True, wait_for_workers=False
        )  # torchrun, too, keeps it itself
        arguments = (ranks, overrides, str(cwd), store.port, self._calls, report, within, main)
        each = self._pool.apart(ranks, _one_rank, *arguments)
        printed = "".join(text for _, text in each)
        assert {own for own, _ in each} == {code}, printed[-4000:]
        return printed


@contextmanager
def importable_here(rank: int) -> Iterator[None]:
    """Context in which a rank imports from its current folder, as `python -m` does, and then forgets it."""
    with patch.object(sys, "path", [os.getcwd(), *sys.path]):
        yield
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(f"{os.getcwd()}/"):
            del sys.modules[name]


def _one_rank(
    rank: int,
    world_size: int,
    overrides: Sequence[str],
    cwd: str,
    port: int,
    call: int,
    report: bool,
    within: Callable[[int], AbstractContextManager[object]],
    main: Callable[[Sequence[str]], int],
) -> tuple[int, str]:
    """One rank of it: exit code and output."""
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    variables = {name: str(value) for name, value in launched.items()} if world_size > 1 else {}
    variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    if world_size > 1:
        variables |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}
        variables |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    printed = io.StringIO()
    with ExitStack() as stack:
        # All calls have one parent. Each is to be a command of its own, which carries on nothing that another began.
        stack.enter_context(patch("trainer.distributed.torchrun.process_start", lambda _: f"call-{call}"))
        if not report:
            stack.enter_context(patch("trainer.run.write_result", lambda *_: None))
        stack.enter_context(patch.dict(os.environ, variables))
        stack.enter_context(chdir(cwd))
        stack.enter_context(redirect_stdout(printed))
        stack.enter_context(redirect_stderr(printed))
        stack.enter_context(within(rank))
        code = main(overrides)
    return code, printed.getvalue()


def until(condition: Callable[[], object], complaint: Callable[[], object]) -> None:
    """Ask until it holds: those who make it so (Slurm, runs that a driver started) tell nobody."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, complaint()
        time.sleep(0.1)


def interrupt_at(
    step: int, *overrides: str, cwd: Path, ranks: int = 1, whole_group: bool = False
) -> tuple[int, str]:
    """Run the trainer with a record at every step, send SIGTERM as soon as `step` is on record.

    With `whole_group` every process gets the signal, as from a scheduler, not the first alone.

    Returns:
        The exit code and all that was printed.
    """
    run_dir = next(Path(o.split("=", 1)[1]) for o in overrides if o.startswith(("run_dir=", "resume=")))
    process = subprocess.Popen(
        [*command(*overrides, ranks=ranks), "trainer.log_every=1"],
        cwd=cwd,
        env=environment({"PYTHONUNBUFFERED": "1"}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    printed: list[str] = []
    try:
        sent = False
        for line in process.stdout:  # one line per logged step: reading it is the wait
            printed.append(line)
            if not sent and any(record["train/step"] >= step for record in records(run_dir)):
                if whole_group:
                    os.killpg(process.pid, signal.SIGTERM)
                else:
                    process.send_signal(signal.SIGTERM)
                sent = True
        return process.wait(TIMEOUT_S), "".join(printed)
    finally:
        process.kill()
        process.stdout.close()


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, or none if there is no such file yet."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def deterministic(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without its timings."""
    return {key: value for key, value in record.items() if not key.startswith(TIMING_PREFIXES)}


def last(run_dir: Path, keys: Sequence[str]) -> list[float]:
    """The last recorded value of each key."""
    found = records(run_dir)
    return [next(record[key] for record in reversed(found) if key in record) for key in keys]


def saved(run_dir: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """All tensors and other values of the last checkpoint."""
    path = newest_checkpoint(run_dir / "checkpoints")
    assert path is not None
    tensors = {key: torch.empty(like.shape, dtype=like.dtype) for key, like in stored_tensors(path).items()}
    values = load_checkpoint(path, tensors)
    return tensors, {key: value for key, value in values.items() if key not in tensors}


def assert_equal_runs(one: Path, other: Path) -> None:
    """The last checkpoints are the same bit for bit, and so are the pairs, and all records but for their timings."""
    tensors, values = saved(one)
    other_tensors, other_values = saved(other)
    assert tensors.keys() == other_tensors.keys()
    assert any(key.startswith("ema/0.99/") for key in tensors)
    assert any(key.endswith("/exp_avg") for key in tensors)
    for key, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[key]), key
    assert values == other_values
    assert [deterministic(r) for r in records(one)] == [deterministic(r) for r in records(other)]
    assert (one / "pairs.jsonl").read_bytes() == (other / "pairs.jsonl").read_bytes()
