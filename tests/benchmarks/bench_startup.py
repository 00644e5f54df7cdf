"""How long a command takes that only has to answer.

    python -m tests.benchmarks.bench_startup [--json PATH]

Beside the commands stand an interpreter that does nothing, and `import torch`, which what must answer at once
must not do.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.rounds import Spread, write_json
from tests.integration.commands import environment

COMMANDS = {
    "python -c pass": ("-c", "pass"),
    "python -c 'import torch'": ("-c", "import torch"),
    "python -m trainer --help": ("-m", "trainer", "--help"),
    "python -m trainer --cfg job": ("-m", "trainer", "--cfg", "job"),
    "python -m launch.compare --help": ("-m", "launch.compare", "--help"),
}
TARGET_S = 1.0
"""Largest median that is aimed at for a command of ours."""


def seconds(arguments: tuple[str, ...], cwd: str) -> float:
    """Wall time of one process."""
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment(), stdout=subprocess.DEVNULL, check=True
    )
    return time.perf_counter() - begin


def measure(rounds: int) -> dict[str, list[float]]:
    """Times of every command, one per round, in an order drawn anew in each."""
    names, order = list(COMMANDS), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            seconds(COMMANDS[name], folder)  # fills the disk cache and writes bytecode
        for _ in range(rounds):
            order.shuffle(names)
            for name in names:
                times[name].append(seconds(COMMANDS[name], folder))
    return times


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="python -m tests.benchmarks.bench_startup"
    )
    parser.add_argument("-n", "--rounds", type=int, default=15, help="times that every command is run")
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("expected at least 2 rounds")
    times = measure(arguments.rounds)
    table = Table("command", "s, median", "quartiles", "target", title=f"{arguments.rounds} times each")
    for name, own in times.items():
        spread = Spread.of(own)
        target = ""
        if "-m" in COMMANDS[name]:
            target = f"{TARGET_S:.2f} {'kept' if spread.median <= TARGET_S else 'missed'}"
        table.add_row(name, f"{spread.median:.3f}", f"{spread.low:.3f} to {spread.high:.3f}", target)
    Console().print(table)
    if arguments.json:
        write_json(arguments.json, {"times": times})


if __name__ == "__main__":
    main()
