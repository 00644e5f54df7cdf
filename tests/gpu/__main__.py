"""Everything that only a GPU can show, in one command of at most eight minutes on one card.

    python -m tests.gpu [--device cuda|cpu] [--only PART ...] [--logs FOLDER]

It prints one JSON line per figure: `{"figure": …, "value": …, "unit": …, "card": …}`. A part that fails prints a line
with its error, the other parts still run, and the exit code is 1. Each part is a process with its own time limit.

Without a card nothing runs and the exit code is 0. `--device cpu` rehearses all parts in a small size on the CPU.
It needs the packages of the project but no network and no `.venv`: `PYTHONPATH=. python -m tests.gpu`.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
ERROR_CHARACTERS = 2000
"""Most characters of an error that are printed, from its end."""


@dataclass(frozen=True)
class Part:
    """A module of this folder that prints JSON lines."""

    name: str
    limit_s: float
    """Seconds that it may take, and what the parts before it left of theirs; then its processes are killed."""
    module: str = ""
    """Empty: as its name."""

    def command(self, device: str) -> list[str]:
        """What is run; the module gets the device, and its part's name where it serves several."""
        return [sys.executable, "-m", f"tests.gpu.{self.module or self.name}", device, self.name]


PARTS = (
    Part("card", 25),
    Part("behaviour", 145),
    Part("gpt2_124m", 110, "recipes"),
    Part("dit_b", 80, "recipes"),
    Part("averages", 60),
    Part("step", 45),
)
"""All together take less than eight minutes, the start of this process included."""
NO_CARD = "no CUDA device is here: nothing was run (python -m tests.gpu --device cpu rehearses the parts)"


def main(argv: list[str] | None = None) -> int:
    """Run the parts one after another and print their figures; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu rehearses all parts")
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="parts to run")
    parser.add_argument("--logs", type=Path, help="folder for all else that the parts print")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(NO_CARD)
        return 0
    card = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU (rehearsal)"
    with tempfile.TemporaryDirectory() as temporary:
        logs = arguments.logs or Path(temporary)
        logs.mkdir(parents=True, exist_ok=True)
        failed = False
        end = time.monotonic()
        for part in PARTS:
            if part.name in arguments.only:
                end += part.limit_s
                failed |= run_part(part, arguments.device, card, end, logs)
    return int(failed)


def run_part(part: Part, device: str, card: str, end: float, logs: Path) -> bool:
    """Run one part until `time.monotonic()` is `end`, and print its lines; returns whether it failed."""
    begin = time.monotonic()
    limit_s = end - begin
    printed, log = logs / f"{part.name}.jsonl", logs / f"{part.name}.log"
    code = _run(part.command(device), device, limit_s, printed, log)
    lines = [line for line in printed.read_text(errors="replace").splitlines() if line.startswith("{")]
    for line in lines:
        report(_parse(line), card)
    report({"figure": f"{part.name}/seconds", "value": round(time.monotonic() - begin, 1), "unit": "s"}, card)
    if code:
        why = f"stopped after {limit_s:.0f} s" if code is TIMED_OUT else f"exit code {code}"
        last = log.read_text(errors="replace")[-ERROR_CHARACTERS:].strip()
        report({"figure": part.name, "error": f"{why}\n{last}"}, card)
    return bool(code)


TIMED_OUT = "timed out"


def _run(command: list[str], device: str, limit_s: float, printed: Path, log: Path) -> int | str:
    """Run a command and return its exit code, or `TIMED_OUT`. None of its processes outlives it."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    if device == "cpu":
        # More threads gain nothing on models this small, and are slow beside other programs.
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # Files and not pipes: what was printed before a time-out is kept, and a left process cannot hold them open.
    with printed.open("w") as out, log.open("w") as err:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return TIMED_OUT
        finally:
            with contextlib.suppress(ProcessLookupError):  # all of them ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _parse(line: str) -> dict[str, object]:
    try:
        found: dict[str, object] = json.loads(line)
        return found
    except ValueError:  # cut off by a time-out
        return {"figure": "unreadable line", "value": line}


def report(line: dict[str, object], card: str) -> None:
    """Print one JSON line."""
    print(json.dumps({**line, "card": card}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
