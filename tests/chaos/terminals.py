"""Take the terminal from a run or a sweep: it stops saved or goes on, with the right exit code, and leaves no process.

The run pauses in a step until its terminal is gone, so that every trial meets it at work.
"""

import json
import os
import pty
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from shlex import join

from tests.chaos.hook import STEP
from tests.chaos.kills import overrides
from tests.chaos.ledger import Trial, Wrong
from tests.chaos.shared import (
    COMMAND_TIMEOUT_S,
    RUN,
    STEPS,
    Arm,
    armed,
    command,
    end_marked,
    expect_equal,
    last_recorded,
    marked,
    reached,
    run_here,
)
from tests.integration.commands import command as command_line
from trainer.errors import EXIT_STOPPED

PAUSE_AT = 5
"""Step before which the run waits."""
END_S = 20.0
"""Seconds in which all processes must have ended after the command."""


def until(condition: Callable[[], object], seconds: float, complaint: str) -> None:
    """Wait until a condition holds.

    Raises:
        Wrong: It does not within these seconds.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Wrong(complaint)
        time.sleep(0.05)


def in_terminal(words: Sequence[str], attack: Callable[[int, int], None], in_ranks: bool) -> int:
    """Run a shell command in a terminal of its own and attack it once the run pauses; return the exit code.

    Args:
        words: command of bash.
        attack: function of the terminal's descriptor and the process.
        in_ranks: whether the run is under torchrun.
    """
    arm = Arm(STEP, PAUSE_AT, "pause", (str(Path("go").absolute()),))
    variables = armed(arm, in_ranks)
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(words[0], list(words), variables)
    try:
        return _attacked(pid, terminal, attack)
    finally:
        end_marked()


def _attacked(pid: int, terminal: int, attack: Callable[[int, int], None]) -> int:
    ended: list[int] = []

    def has_ended() -> bool:
        if not ended and (found := os.waitpid(pid, os.WNOHANG))[0]:
            ended.append(os.waitstatus_to_exitcode(found[1]))
        return bool(ended)

    def drained_until(condition: Callable[[], object], complaint: str) -> None:
        os.set_blocking(terminal, False)

        def check() -> object:
            try:
                while os.read(terminal, 1 << 16):
                    pass
            except OSError:  # nothing to read, or closed by the attack
                pass
            return condition()

        until(check, COMMAND_TIMEOUT_S, complaint)

    drained_until(lambda: Path("hit").exists() or has_ended(), "the run did not begin its steps")
    if not ended:
        attack(terminal, pid)
        time.sleep(0.3)  # the signal arrives before the run goes on
    Path("go").touch()
    drained_until(has_ended, "hangs after its terminal was taken")
    until(lambda: not marked(), END_S, f"processes are left: {marked()}")
    return ended[0]


def hang_up(terminal: int, _: int) -> None:
    """Close the terminal, as a dropped ssh does: all its processes get SIGHUP, and writing fails."""
    replacement = os.open(os.devnull, os.O_RDWR)
    os.dup2(replacement, terminal)


def sighup(_: int, pid: int) -> None:
    """Send SIGHUP to the command alone."""
    os.kill(pid, signal.SIGHUP)


def control_c(terminal: int, _: int) -> None:
    """Type Ctrl-C: every process of the foreground group gets SIGINT, `tee` included."""
    os.write(terminal, b"\x03")


ATTACKS: dict[str, tuple[str, Callable[[int, int], None], tuple[int, ...]]] = {
    "the terminal hangs up": ("{}", hang_up, (EXIT_STOPPED,)),
    "SIGHUP": ("exec {}", sighup, (EXIT_STOPPED,)),
    "Ctrl-C with | tee": ("set -o pipefail; {} | tee printed", control_c, (EXIT_STOPPED, 130)),
    "| head": ("set -o pipefail; {} | head -n 3", lambda *_: None, (0,)),
}
"""Command of bash, what is done to it, and the exit codes that are right."""


def attack_run(_: random.Random, *, name: str, reference: Path, ranks: int) -> str:
    """Take the terminal of a run, and resume it."""
    words = (*overrides(ranks, True), "run_dir=run")
    launched = command_line(*words, ranks=ranks)
    text, attack, codes = ATTACKS[name]
    code = in_terminal(["bash", "-c", text.format(join(launched))], attack, ranks > 1)
    _check_code(code, codes if ranks == 1 or codes == (0,) else (*codes, 1, 128 + 1, -1))
    _check_saved(Path("run"), needs_all=codes == (0,))
    run_here("resume=run", ranks=ranks).expect(0)
    expect_equal(reference / "run", Path("run"))
    return "equal"


def attack_closed_pipe(_: random.Random, *, reference: Path) -> str:
    """Close the pipe that a run prints to before it prints."""
    words = [sys.executable, "-m", "trainer", *RUN, "run_dir=run"]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=armed(), start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.close()
    try:
        code = process.wait(COMMAND_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise Wrong("hangs after its output was closed") from None
    finally:
        end_marked()
    _check_code(code, (0,))
    expect_equal(reference / "run", Path("run"))
    return "equal"


def attack_sweep(_: random.Random, *, name: str, reference: Path) -> str:
    """Take the terminal of a sweep, and retry it."""
    swept = [*RUN, "seed=0,1", "launch.slots=1", "sweep_dir=sweep"]
    text, attack, codes = ATTACKS[name]
    launched = join([sys.executable, "-m", "launch", "-m", *swept])
    code = in_terminal(["bash", "-c", text.format(launched)], attack, in_ranks=False)
    _check_code(code, codes)
    jobs = [
        Path("sweep") / job["run_dir"] for job in json.loads(Path("sweep/sweep.json").read_text())["jobs"]
    ]
    _check_saved(jobs[0], needs_all=codes == (0,))
    command([sys.executable, "-m", "launch.retry", "sweep"]).expect(0)
    if any(reached(job) != STEPS for job in jobs):
        raise Wrong("the retried sweep has unfinished runs")
    expect_equal(reference / "run", jobs[0])
    return "equal"


def _check_code(code: int, right: Sequence[int]) -> None:
    if code not in right:
        raise Wrong(f"exit code {code}, expected {' or '.join(map(str, right))}")


def _check_saved(run: Path, *, needs_all: bool) -> None:
    recorded, kept = last_recorded(run), reached(run)
    if kept < max(recorded, STEPS if needs_all else 1):
        raise Wrong(f"step {recorded} is on record and step {kept} saved")


def trials(count: int, references: Path, short: bool) -> Iterator[Trial]:
    """Yield each way to lose a terminal: runs, sweeps, and runs under torchrun."""
    one, two = references / "1-async", references / "2-async"
    runs = [(name, 1, one) for name in ATTACKS]
    runs += [(name, 2, two) for name in ("the terminal hangs up", "Ctrl-C with | tee")]
    every = [_trial(f"{name}: sweep", partial(attack_sweep, name=name, reference=one)) for name in ATTACKS]
    every += [
        _trial(
            f"{name}: {'torchrun' if ranks > 1 else 'run'}",
            partial(attack_run, name=name, reference=reference, ranks=ranks),
        )
        for name, ranks, reference in runs
    ]
    closed = partial(attack_closed_pipe, reference=one)
    every.insert(0, _trial("closed pipe: run", closed))
    if short:
        every = [trial for trial in every if trial.name == "Ctrl-C with | tee: run"]
    yield from every[:count]


def _trial(name: str, work: Callable[[random.Random], str]) -> Trial:
    return Trial("terminals", name, name, work)
