"""Send a signal to a run at an event of a phase: nothing done is lost, and the run goes on to the undisturbed result.

Exit codes: 75 after the state was saved, 0 if the run had all its steps. Before the first step, and after the last one
is saved, a signal may end the process as it ends any other.
"""

import random
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from tests.chaos.hook import PHASES, STEP
from tests.chaos.kills import end, events_of, overrides
from tests.chaos.ledger import Trial, Wrong
from tests.chaos.shared import STEPS, Arm, Session, command, last_recorded, reached, run_here
from tests.integration.commands import command as command_line
from trainer.errors import EXIT_STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
IN_THE_LOOP = (
    "training",
    "logging",
    "evaluating",
    "taking the state",
    "writing tensors",
    "before the commit",
)
INTERRUPTED = 130
"""Exit code of a forked process that ends by KeyboardInterrupt."""


def check_stopped(
    session: Session, run: Path, number: int, *, codes: Sequence[int] = (EXIT_STOPPED,)
) -> None:
    """Check that a session which got a signal lost nothing.

    Args:
        session: session that has ended.
        run: its run directory.
        number: number of the signal.
        codes: exit codes after a save.

    Raises:
        Wrong: The exit code is another one, or steps on record are not in a checkpoint.
    """
    recorded, kept = last_recorded(run), reached(run)
    if session.code in codes:
        if kept < recorded or not kept:
            raise Wrong(f"exit code {session.code}, but step {recorded} is on record and step {kept} saved")
        if "resume=" not in session.printed:
            raise Wrong(f"stopped without the command that continues it: {session.tail}")
    elif session.code == 0:
        if kept != STEPS:
            raise Wrong(f"exit code 0, but step {kept} is the last one saved")
    elif session.code not in (-number, INTERRUPTED, 1):
        raise Wrong(f"exit code {session.code} after signal {number}: {session.tail}")
    elif recorded and kept != STEPS:
        raise Wrong(f"ended by signal {number} with step {recorded} on record and step {kept} saved")


def signal_here(
    chance: random.Random, *, number: int, phase: str, reference: Path, ranks: int, is_async: bool
) -> str:
    """Send a signal to one of the forked processes of a run."""
    arm = Arm(phase, chance.randint(1, events_of(phase, reference)), "send", (int(number),))
    ended = run_here(
        *overrides(ranks, is_async), "run_dir=run", ranks=ranks, arm=arm, report=phase == "report"
    )
    if not arm.was_hit():
        raise Wrong(f"the phase was not hit, exit code {ended.code}: {ended.tail}")
    if ended.code == 1 and (ranks == 1 or "Traceback (most recent call last)" in ended.printed):
        raise Wrong(f"failed after {number}: {ended.tail}")
    check_stopped(ended, Path("run"), number)
    return end(reference, ranks, is_async)


def signal_command(
    chance: random.Random, *, number: int, phase: str, reference: Path, ranks: int, is_async: bool
) -> str:
    """Send a signal to `python -m trainer`, or to a torchrun, whose own exit code is not zero after it."""
    words = (*overrides(ranks, is_async), "run_dir=run")
    launched = command_line(*words, ranks=ranks)
    # torchrun passes on neither SIGUSR2 nor its reason, so a scheduler sends it to the ranks.
    action = "send_agent" if ranks > 1 and number != signal.SIGUSR2 else "send"
    arm = Arm(phase, chance.randint(1, events_of(phase, reference)), action, (int(number),))
    ended = command(launched, arm=arm, in_ranks=ranks > 1)
    if not arm.was_hit():
        raise Wrong(f"the phase was not hit, exit code {ended.code}: {ended.tail}")
    check_stopped(
        ended,
        Path("run"),
        number,
        codes=(EXIT_STOPPED,) if ranks == 1 else (EXIT_STOPPED, 1, -number, 128 + number),
    )
    return end(reference, ranks, is_async)


def trials(count: int, references: Path, short: bool) -> Iterator[Trial]:
    """Yield each signal at each phase in turn: forked processes, two ranks, commands, and a torchrun."""
    phases = [phase for phase in PHASES if phase != "import torch"]
    for trial in range(count):
        number = SIGNALS[trial % len(SIGNALS)]
        is_async = trial // 2 % 2 == 1
        phase = (
            (STEP, *phases)[trial * 7 % (len(phases) + 1)]
            if not short
            else IN_THE_LOOP[trial % len(IN_THE_LOOP)]
        )
        kind = 0 if short else (0, 0, 1, 2, 0, 0, 1, 3, 0, 0)[trial // len(SIGNALS) % 10]
        ranks = 2 if kind in (1, 3) else 1
        if kind == 2 and trial % 2:
            phase = "import torch"
        if kind == 3:
            phase = STEP
        where = ("1 process, forked", "2 ranks, forked", "python -m trainer", "torchrun")[kind]
        work = partial(
            signal_command if kind > 1 else signal_here,
            number=number,
            phase=phase,
            reference=references / f"{ranks}-{'async' if is_async else 'sync'}",
            ranks=ranks,
            is_async=is_async,
        )
        name = "in a step" if phase == STEP else phase
        yield Trial("signals", f"{number.name}, {where}", f"{trial} {number.name} {name}", work, name)
