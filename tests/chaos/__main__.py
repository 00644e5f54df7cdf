"""Attack runs and print what came out: `python -m tests.chaos [kills|damage|…] [--count N] [--seconds S]`.

The exit code is 1 if anything came out wrong. Each fault is printed with the command that tries it again.
"""

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib.pyplot  # noqa: F401  # all that a session imports, before the first fork
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401

import trainer.run  # noqa: F401
from tests.chaos import damage, disk, fuzz, hostile, kills, power, signals, terminals
from tests.chaos.ledger import Ledger, Trial, carry_out


def reference_trials(references: Path, short: bool) -> Iterator[Trial]:
    """Yield the undisturbed runs, with which the others are compared."""
    for ranks in (1, 2):
        for is_async in (False, True):
            if short and ranks == 2:
                continue
            folder = references / f"{ranks}-{'async' if is_async else 'sync'}"
            folder.mkdir()

            def work(_: object, folder: Path = folder, ranks: int = ranks, is_async: bool = is_async) -> str:
                # A report takes longer than the rest; the short form has no attack that needs that of a reference.
                kills.make_reference(folder, ranks, is_async, report=not short)
                return "equal"

            yield Trial("undisturbed", f"{ranks} process(es)", folder.name, work)
    folder = references / damage.VICTIM
    folder.mkdir()
    yield Trial("undisturbed", "made for damage", "victim", partial(damage.make_victim, folder=folder))


ATTACKS: dict[str, Callable[[int, Path, bool], Iterator[Trial]]] = {
    "kills": kills.trials,
    "damage": damage.trials,
    "disk": disk.trials,
    "power": power.trials,
    "signals": signals.trials,
    "terminals": terminals.trials,
    "hostile": hostile.trials,
    "fuzz": fuzz.trials,
}
SECONDS = {"fuzz": 600.0}
"""Longest time of an attack by default, in the long form; the others end with their trials."""
COUNTS = {
    "kills": (100, 4),
    "damage": (100_000, 4),
    "disk": (13, 1),
    "power": (5, 1),
    "signals": (40, 2),
    "terminals": (11, 0),
    "hostile": (100, 0),
    "fuzz": (100_000, 2),
}
"""Number of trials of each attack by default, in the long form and in the short one."""


def main() -> int:
    """Carry out the attacks that the command line names, and print the ledger."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("attack", nargs="*", help=f"{', '.join(ATTACKS)}; all by default")
    parser.add_argument("--count", type=int, help="trials of each attack; the default is that of each attack")
    parser.add_argument("--seconds", type=float, help="longest time of each attack")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trials at the same time")
    parser.add_argument("--trial", help="name of the one trial to carry out")
    parser.add_argument("--short", action="store_true", help="the form of `make test`")
    parser.add_argument("--out", type=Path, help="file for the ledger as JSON lines")
    options = parser.parse_args()
    if unknown := set(options.attack) - set(ATTACKS):
        parser.error(f"no attack {', '.join(sorted(unknown))}; expected {', '.join(ATTACKS)}")
    gc.freeze()
    ledger = Ledger(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    references = folder / "references"
    references.mkdir()
    carry_out(reference_trials(references, options.short), ledger, folder, jobs=options.jobs, seconds=None)
    for name in options.attack or ATTACKS:
        if ledger.faults and "undisturbed" in ledger.faults[0].values():
            break
        count = COUNTS[name][options.short] if options.count is None else options.count
        # The count decides what a trial of this name is.
        ledger.options = f"--seed {options.seed} --count {count}{' --short' if options.short else ''}"
        trials = ATTACKS[name](count, references, options.short)
        if options.trial is not None:
            trials = (trial for trial in trials if trial.name == options.trial)
        seconds = options.seconds or (None if options.short else SECONDS.get(name))
        carry_out(trials, ledger, folder, jobs=options.jobs, seconds=seconds)
    if options.trial is not None and not any(row[0] in ATTACKS for row in ledger.rows):
        parser.error(f"no trial {options.trial!r}; its name depends on --count")
    print(ledger.table("on"))
    if ledger.phases:
        print(f"\n{ledger.table('phase')}")
    for note, times in ledger.notes.items():
        print(f"{note} ({times} times)")
    for fault in ledger.faults:
        print(f"WRONG {fault['fault']}\n  {fault['reproduce']}")
    if options.out is not None:
        options.out.write_text("".join(json.dumps(line) + "\n" for line in ledger.lines()))
    if ledger.faults:
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
