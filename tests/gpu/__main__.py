"""Everything that only a GPU can show, in one command of at most eight minutes on one card.

    python -m tests.gpu [--device cuda|cpu] [--only PART ...]

It prints one JSON line per figure: `{"figure": …, "value": …, "unit": …, "card": …}`. A part that fails prints a line
with its error, the other parts still run, and the exit code is 1. Each part is a process with its own time limit.

Without a card nothing runs and the exit code is 0. `--device cpu` rehearses all parts in a small size on the CPU.
It needs the packages of the project but no network and no `.venv`: `PYTHONPATH=. python -m tests.gpu`.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass

import torch

TOTAL_S = 480.0
"""Seconds for all parts together."""


@dataclass(frozen=True)
class Part:
    """A module of this folder that prints JSON lines."""

    name: str
    limit_s: float
    """Seconds after which its process is killed."""


PARTS = (
    Part("behaviour", 200),
    Part("averages", 120),
    Part("step", 120),
    Part("recipes", 240),
)
NO_CARD = "no CUDA device is here: nothing was run (python -m tests.gpu --device cpu rehearses the parts)"


def main(argv: list[str] | None = None) -> int:
    """Run the parts one after another and print their figures; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu rehearses all parts")
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="parts to run")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(NO_CARD)
        return 0
    card = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU (rehearsal)"
    end = time.monotonic() + TOTAL_S
    failed = False
    for part in PARTS:
        if part.name in arguments.only:
            failed |= run_part(part, arguments.device, card, end)
    return int(failed)


def run_part(part: Part, device: str, card: str, end: float) -> bool:
    """Run one part and print its lines with the card's name; returns whether it failed."""
    limit_s = min(part.limit_s, end - time.monotonic())
    begin = time.monotonic()
    if limit_s <= 0:
        report({"figure": part.name, "error": f"not run: {TOTAL_S:.0f} s are over"}, card)
        return True
    command = [sys.executable, "-m", f"tests.gpu.{part.name}", device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
        printed, error = done.stdout, done.stderr[-2000:] if done.returncode else ""
    except subprocess.TimeoutExpired as expired:
        printed = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        error = f"stopped after {limit_s:.0f} s"
    for line in printed.splitlines():
        if line.startswith("{"):
            report(json.loads(line), card)
    report({"figure": f"{part.name}/seconds", "value": round(time.monotonic() - begin, 1), "unit": "s"}, card)
    if error:
        report({"figure": part.name, "error": error}, card)
    return bool(error)


def report(line: dict[str, object], card: str) -> None:
    """Print one JSON line."""
    print(json.dumps({**line, "card": card}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
