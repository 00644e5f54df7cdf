"""A training step with snapshots of the averages against the same step without them.

    python -m tests.benchmarks.bench_snapshots [--rounds 20] [--every 16] [--json PATH]

Both are the quickstart with the averages of `ema=posthoc`. One takes a snapshot every 16 steps, as 32 in 500 steps do,
and a thread writes it while the training goes on. A turn has as many steps as lie between two snapshots, so that each
turn of it has one. The loop without snapshots runs twice: its ratio to itself is the noise.
"""

import argparse
import contextlib
import gc
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table

from tests.benchmarks.bench_step import NEVER, RUN, our_trainer
from tests.benchmarks.rounds import Spread, StepTime, Turns, keep_freed_memory, ratio, take_turns, write_json
from trainer.config.compose import compose
from trainer.distributed.processes import join, leave
from trainer.session import open_session

WITHOUT, AGAIN = "without snapshots", "without snapshots, again"
DTYPES = ("float32", "bfloat16")
TARGET = 1.02
"""Largest median ratio of wall time that is aimed at."""


def measure(rounds: int, every: int) -> dict[str, list[StepTime]]:
    """Time all loops in rounds; return seconds per step by name of the loop."""
    torch.set_num_threads(1)
    common = [*RUN, f"trainer.log_every={NEVER}", "ema=posthoc"]
    count = rounds + 2
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        processes = join(open_session(*compose(common)).config.trainer)
        stack.callback(leave)
        loops = []
        for number, name in enumerate((WITHOUT, AGAIN, *DTYPES)):
            own = ["ema.snapshots=0"]
            if name in DTYPES:
                own = [
                    f"ema.snapshots={count}",
                    f"ema.snapshot_dtype={name}",
                    f"trainer.steps={count * every}",
                ]
            _, _, side = our_trainer([*common, *own], Path(folder, str(number)), processes)
            loops.append(Turns(name, side.loop))
        for loop in loops:
            loop.take(every + every // 2)  # so that each snapshot is in the middle of a turn
        gc.collect()
        gc.freeze()
        times = take_turns(loops, rounds, every)
        for loop in loops:
            loop.close()
    return times


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="python -m tests.benchmarks.bench_snapshots"
    )
    parser.add_argument("--rounds", type=int, default=20, help="rounds in which every loop has its turn")
    parser.add_argument("--every", type=int, default=16, help="steps between two snapshots")
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    keep_freed_memory()
    times = measure(arguments.rounds, arguments.every)
    table = Table(
        "loop", "ms per step", *(Column(name, no_wrap=True) for name in ("ratio in a round", "target"))
    )
    ratios = {}
    for name, own in times.items():
        spread = Spread.of([1e3 * time.wall for time in own])
        ratios[name] = ratio([time.wall for time in own], [time.wall for time in times[WITHOUT]])
        target = ""
        if name in DTYPES:
            target = f"{TARGET:.2f} {'kept' if ratios[name].median <= TARGET else 'missed'}"
        title = f"snapshots in {name}" if name in DTYPES else name
        table.add_row(title, f"{spread.median:.2f}", str(ratios[name]), target)
    Console().print(table)
    if arguments.json:
        settings = {"rounds": arguments.rounds, "every": arguments.every}
        write_json(arguments.json, {"settings": settings, "ratios": ratios, "times": times})


if __name__ == "__main__":
    main()
