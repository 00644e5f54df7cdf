"""Kill a run at an event of each phase, resume it to its end, and compare it with an undisturbed run bit for bit."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.chaos.hook import PHASES, STEP
from tests.chaos.ledger import Trial, Wrong
from tests.chaos.shared import RUN, STEPS, Arm, Session, command, expect_equal, run_here
from tests.integration.commands import command as command_line

ONLY_IN_A_COMMAND = ("import torch",)
"""Phases that forked processes have behind them."""
SECOND_KILL = 0.3
"""Chance that the session which resumes a killed one is killed, too."""
IN_THE_SHORT_FORM = ("training", "writing tensors", "before the commit", "between rename and marker")
TRIES = 6
"""Numbers of events that are tried until one is hit: the events of a phase vary with threads."""


def saving(is_async: bool) -> tuple[str, ...]:
    """Return the override that chooses how checkpoints are written."""
    return (f"trainer.async_save={str(is_async).lower()}",)


def overrides(ranks: int, is_async: bool) -> tuple[str, ...]:
    """Return the command line of the run without its directory."""
    return (*RUN, *saving(is_async), *(("sharding=fsdp",) if ranks > 1 else ()))


def make_reference(folder: Path, ranks: int, is_async: bool, report: bool) -> None:
    """Carry out the undisturbed run of this configuration in a folder, and count its events."""
    run_here(*overrides(ranks, is_async), "run_dir=run", ranks=ranks, count=True, report=report).expect(0)
    shutil.copytree("run", folder / "run")
    shutil.copy("counts", folder / "counts")


def go_on(ranks: int, is_async: bool, report: bool = False) -> Session:
    """Resume the run of the current folder to its end; begin it again if it was killed before it could be resumed."""
    run = Path("run")
    if not (run / "meta.json").exists():
        return run_here(*overrides(ranks, is_async), "run_dir=run", ranks=ranks, report=report)
    resumed = run_here("resume=run", ranks=ranks, report=report)
    if resumed.refusal and "has records and no checkpoint" in resumed.refusal:
        (run / "metrics.jsonl").rename(run / "metrics.jsonl.first")  # as the refusal advises
        resumed = run_here("resume=run", ranks=ranks, report=report)
    return resumed


def kill_here(
    chance: random.Random, *, phase: str, reference: Path, ranks: int = 1, is_async: bool = False
) -> str:
    """Kill forked processes at an event of a phase, and the next session sometimes, too; then go on to the end."""
    events = json.loads((reference / "counts").read_text()).get(phase, 0)
    report = phase in ("report", "exit")
    for _ in range(TRIES):
        if not events:
            break
        number = chance.randint(1, events)
        arm = Arm(phase, number, "kill_group", rank=0)
        ended = run_here(*overrides(ranks, is_async), "run_dir=run", ranks=ranks, arm=arm, report=report)
        if arm.was_hit():
            break
        events = number - 1
        ended.expect(0)
        shutil.rmtree("run")
    else:
        raise Wrong(f"the phase was not hit in {TRIES} sessions")
    if not events:
        raise Wrong("the phase has no event: its pattern in hook.PHASES fits nothing any more")
    if ended.code != -9:
        raise Wrong(f"exit code {ended.code} after kill -9: {ended.tail}")
    if chance.random() < SECOND_KILL and Path("run/meta.json").exists():
        again = chance.choice([name for name in PHASES if name not in ONLY_IN_A_COMMAND])
        armed = Arm(again, chance.randint(1, 20), "kill_group")
        run_here("resume=run", ranks=ranks, arm=armed).expect(0, 2, -9)
    return end(reference, ranks, is_async)


def end(reference: Path, ranks: int, is_async: bool) -> str:
    """Go on to the end and compare."""
    go_on(ranks, is_async).expect(0)
    expect_equal(reference / "run", Path("run"))
    return "equal"


def kill_command(
    chance: random.Random, *, phase: str, reference: Path, ranks: int = 1, is_async: bool = False
) -> str:
    """Kill `python -m trainer`, or a torchrun with its ranks; then go on to the end."""
    words = (*overrides(ranks, is_async), "run_dir=run")
    launched = command_line(*words, ranks=ranks)
    number = chance.randint(1, events_of(phase, reference))
    arm = Arm(
        phase,
        number,
        "kill_job" if ranks > 1 else "kill_self",
        rank=chance.randrange(ranks) if phase in EVERY_RANK else 0,
    )
    ended = command(launched, arm=arm, in_ranks=ranks > 1)
    if not arm.was_hit():
        raise Wrong(f"event {number} was not hit, exit code {ended.code}: {ended.tail}")
    return end(reference, ranks, is_async)


EVERY_RANK = ("import torch", "building", "training", "evaluating", "taking the state")
"""Phases whose events are the same on all ranks."""


def kill_one_rank(chance: random.Random, *, phase: str, reference: Path, is_async: bool = False) -> str:
    """Kill one rank of a torchrun that restarts its ranks: the run must end by itself."""
    number = chance.randint(1, events_of(phase, reference))
    arm = Arm(phase, number, "kill_self", rank=chance.randrange(2) if phase in EVERY_RANK else 0)
    launched = command_line(*overrides(2, is_async), "run_dir=run", ranks=2, restarts=1)
    ended = command(launched, arm=arm, in_ranks=True)
    if not arm.was_hit():
        raise Wrong(f"event {number} was not hit, exit code {ended.code}: {ended.tail}")
    if ended.code != 0:
        raise Wrong(f"the restarted run ended with exit code {ended.code}: {ended.tail}")
    expect_equal(reference / "run", Path("run"))
    return "equal"


def events_of(phase: str, reference: Path) -> int:
    """Return how many events of a phase may be hit in any session."""
    counted = json.loads((reference / "counts").read_text()).get(phase, 0)
    if phase == STEP:
        return STEPS - 1
    return 500 if phase == "import torch" else max(1, counted // 2)


def trials(count: int, references: Path, short: bool) -> Iterator[Trial]:
    """Yield kills: every phase in forked processes, then in commands and under torchrun."""
    ways = [False, True]
    here = IN_THE_SHORT_FORM if short else [phase for phase in PHASES if phase not in ONLY_IN_A_COMMAND]
    commands = 0 if short else count * 4 // 10
    for number in range(count - commands):
        phase = here[number % len(here)]
        is_async = ways[(number if short else number // len(here)) % len(ways)]
        ranks = 1 if short or number % 3 else 2
        yield _trial(number, kill_here, phase, references, ranks, is_async, f"{_processes(ranks)}, forked")
    for number in range(count - commands, count):
        phases = list(PHASES)
        # Each of the three ways goes through the phases, from another one on.
        phase = phases[(number // 3 + number % 3 * len(phases) // 3) % len(phases)]
        is_async = ways[number // 3 % len(ways)]
        if number % 3 == 0:
            yield _trial(number, kill_command, phase, references, 1, is_async, "python -m trainer")
        elif number % 3 == 1:
            yield _trial(number, kill_command, phase, references, 2, is_async, "torchrun, all ranks")
        else:
            one = partial(
                kill_one_rank, phase=phase, reference=references / _name(2, is_async), is_async=is_async
            )
            yield Trial(
                "kills",
                f"torchrun --max-restarts=1, one rank{_way(is_async)}",
                f"{number} {phase}",
                one,
                phase,
            )


def _trial(
    number: int,
    work: Callable[..., str],
    phase: str,
    references: Path,
    ranks: int,
    is_async: bool,
    where: str,
) -> Trial:
    reference = references / _name(ranks, is_async)
    bound = partial(work, phase=phase, reference=reference, ranks=ranks, is_async=is_async)
    return Trial("kills", f"{where}{_way(is_async)}", f"{number} {phase}", bound, phase)


def _name(ranks: int, is_async: bool) -> str:
    return f"{ranks}-{'async' if is_async else 'sync'}"


def _way(is_async: bool) -> str:
    return ", asynchronous saving" if is_async else ""


def _processes(ranks: int) -> str:
    return "1 process" if ranks == 1 else f"{ranks} ranks"
