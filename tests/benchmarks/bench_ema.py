"""The averages against their peers and against the memory bandwidth.

    python -m tests.benchmarks.bench_ema [--threads 1 2] [--only SECTION ...] [--json PATH] [--plot PATH]

Sections: `small` (1,600 tensors of 1,000 elements), `large` (23 M and 124 M parameters, float32 and bfloat16),
`sharded` (FSDP2 on two processes), `bank` and `quickstart` (eight averages at once), `teacher` (a forward
with the average's weights), `allocation`, `growth`.

All contenders of a section average the same model in one process, and must agree before they are timed. They take
turns in rounds; ratios are between turns of one round. A turn is many calls, so what fits into the caches is in them,
for all alike. A peer that is not installed, or cannot do what a section asks, stands in the table with its own words.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from tests import forked
from tests.benchmarks.bench_ema_bank import allocation, bank, quickstart
from tests.benchmarks.bench_ema_figures import Figure, table
from tests.benchmarks.bench_ema_growth import growth
from tests.benchmarks.bench_ema_ranks import ranks
from tests.benchmarks.bench_ema_sharded import sharded
from tests.benchmarks.bench_ema_speed import large, small
from tests.benchmarks.bench_ema_teacher import teacher
from tests.benchmarks.ema_peers import versions
from tests.benchmarks.rounds import keep_freed_memory, write_json

Section = Callable[[int, int], list[Figure]]
"""From a number of threads and of rounds to what was found."""

SECTIONS: dict[str, Section] = {
    "small": small,
    "large": large,
    "sharded": sharded,
    "ranks": ranks,
    "bank": bank,
    "quickstart": quickstart,
    "teacher": teacher,
    "allocation": allocation,
    "growth": growth,
}
WIDTH = 150
"""Columns that the table needs; a narrower terminal, or a file, gets them all the same."""
EVERY_THREADS = ("small", "large")
"""Sections that run with each number of threads; the others with the first."""


def measure(names: list[str], threads: list[int], rounds: int, plot: Path | None) -> dict[str, list[Figure]]:
    """Run sections by name; tells standard error which."""
    beside = None if plot is None else plot.with_stem(f"{plot.stem}-ranks")
    sections = SECTIONS | {"growth": partial(growth, plot=plot), "ranks": partial(ranks, plot=beside)}
    found: dict[str, list[Figure]] = {}
    for name in names:
        begin = time.perf_counter()
        found[name] = []
        for number in threads if name in EVERY_THREADS else threads[:1]:
            found[name] += sections[name](number, rounds)
        print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="python -m tests.benchmarks.bench_ema"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="sections")
    parser.add_argument("--rounds", type=int, default=20, help="rounds; slow sections take fewer")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--plot", type=Path, help="PNG of the growth to write; that of the ranks beside it")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2 or min(arguments.threads) < 1:
        parser.error("expected at least 2 rounds, and at least 1 thread")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parse(argv)
    forked.install()  # the ranks are forks of one process that imports torch
    keep_freed_memory()
    found = measure(arguments.only, arguments.threads, arguments.rounds, arguments.plot)
    Console(width=max(Console().width, WIDTH)).print(table(found.items()))
    if arguments.json:
        settings: dict[str, Any] = {"rounds": arguments.rounds, "threads": arguments.threads}
        sections = {name: [with_verdict(figure) for figure in figures] for name, figures in found.items()}
        write_json(arguments.json, {"packages": versions(), "settings": settings, "sections": sections})


def with_verdict(figure: Figure) -> dict[str, Any]:
    """A figure for JSON, with whether its target is met."""
    return {**vars(figure), "met": figure.met}


if __name__ == "__main__":
    main()
