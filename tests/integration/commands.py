"""The project's real command lines, in processes of their own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 240

TINY_GPT = (
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=32",
    "model.context=32",
    "data.context=32",
    "data.max_bytes=200000",
    "trainer.global_batch_size=8",
    "trainer.eval_samples=16",
    "trainer.eval_batch_size=4",
    "trainer.num_threads=1",
    "logger=none",
)
"""Overrides that make the quickstart's model and data small enough for a test of one second."""

TIMING_PREFIXES = ("time/", "throughput/", "mem/")
"""Metrics that no two runs share."""


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with the tree importable, one thread, and nothing of an enclosing torchrun."""
    kept = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    }
    return (
        kept | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "160"} | dict(extra or {})
    )


def command(*arguments: str, ranks: int = 0, module: str = "trainer") -> list[str]:
    """`python -m trainer …` or another module, or under torchrun with that many processes."""
    if not ranks:
        return [sys.executable, "-m", module, *arguments]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, "-m", module, *arguments]


def trainer(
    *overrides: str, cwd: Path, ranks: int = 0, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run the trainer to its end and return what it printed."""
    return run_to_end(command(*overrides, ranks=ranks), cwd=cwd, check=check)


def run_to_end(
    words: Sequence[str], *, cwd: Path, check: bool = True, extra: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run any command line to its end, in `environment`; a failure is one of the test unless `check` is off."""
    done = subprocess.run(
        words,
        cwd=cwd,
        env=environment(extra),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def interrupt_at(
    step: int, *overrides: str, cwd: Path, ranks: int = 0, whole_group: bool = False
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
