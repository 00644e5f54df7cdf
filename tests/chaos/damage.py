"""Damage each file and folder of an interrupted run in each way, then resume it.

The session may continue if its result equals that of the undisturbed run, or refuse in one line with exit code 2 and
change nothing. Other numbers, a traceback and a session that hangs are wrong.
"""

import ctypes
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.chaos.hook import STEP
from tests.chaos.ledger import Trial, Wrong
from tests.chaos.shared import RUN, Arm, expect_equal, run_here

PLACES = 5
"""Places in a file at which it is truncated and at which a bit is flipped."""
FALLBACK = "resume.fallback=true"
VICTIM = "victim"
"""Folder of the references with the run that is damaged."""
_CAPABILITIES = 0x20080522
_IGNORES_MODES = 0b110
"""Bits of CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which root reads what its mode forbids."""


def truncate(path: Path, place: int) -> None:
    """Truncate a file at the n-th of the places."""
    os.truncate(path, path.stat().st_size * place // (PLACES + 1))


def flip(path: Path, place: int) -> None:
    """Flip one bit of a file at the n-th of the places."""
    data = bytearray(path.read_bytes())
    data[(len(data) - 1) * (place - 1) // (PLACES - 1)] ^= 1 << (place + 1)
    path.write_bytes(data)


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def replace(path: Path, make: Callable[[Path], object]) -> None:
    """Make something else in the place of a file or a folder."""
    remove(path)
    make(path)


WHOLE: dict[str, Callable[[Path], object]] = {
    "removed": remove,
    "a link loop": lambda path: replace(path, lambda place: place.symlink_to(place.name)),
    "unreadable": lambda path: path.chmod(0),
    "a FIFO": lambda path: replace(path, os.mkfifo),
}
ON_FILES: dict[str, Callable[[Path], object]] = {
    **{f"truncated at {k}": partial(truncate, place=k) for k in range(1, PLACES + 1)},
    **{f"a bit flipped at {k}": partial(flip, place=k) for k in range(1, PLACES + 1)},
    "emptied": lambda path: os.truncate(path, 0),
    "a directory": lambda path: replace(path, Path.mkdir),
    **WHOLE,
}
ON_FOLDERS: dict[str, Callable[[Path], object]] = {
    "a file": lambda path: replace(path, lambda place: place.write_text("")),
    **WHOLE,
}


def obey_modes() -> None:
    """Give up root's right to read and write files whose mode forbids it; other users have no such right."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable; low words, then high words
    for call in (libc.capget, libc.capset):
        if call(header, sets):
            raise OSError(ctypes.get_errno(), "capabilities cannot be changed")
        sets[0] &= ~_IGNORES_MODES


def make_victim(_: random.Random, *, folder: Path) -> str:
    """Make a run that finished 8 steps with a report, was resumed to 12, and was killed after 11, in a folder."""
    run_here(*RUN, "trainer.steps=8", "run_dir=run", report=True).expect(0)
    last = Arm(STEP, 4, "kill_group")
    if run_here("resume=run", "trainer.steps=12", arm=last).code != -9:
        raise Wrong("the run was not killed")
    shutil.copytree("run", folder / "run")
    return "harmless"


def content(run: Path) -> dict[str, bytes]:
    """Return the bytes of each regular file but the lock."""
    paths = [path for path in run.rglob("*") if path.is_file() and os.access(path, os.R_OK)]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths if path.name != "run.lock"}


def resume_damaged(
    _: random.Random,
    *,
    victim: Path,
    name: str,
    damage: Callable[[Path], object],
    reference: Path,
    more: tuple[str, ...],
) -> str:
    """Resume a copy of the victim after one of its files was damaged."""
    run = Path("run")
    shutil.copytree(victim / "run", run)
    damage(run / name)
    before = content(run)
    report = name.startswith("report")
    session = run_here("resume=run", *more, before=obey_modes, report=report)
    if session.refusal:
        if content(run) != before:
            raise Wrong(f"refused, but the directory was changed: {session.refusal}")
        return "refused"
    is_unreported = (
        report and session.code == 1 and session.error is not None
    )  # trained, saved, and no report
    session.expect(1 if is_unreported else 0)
    expect_equal(reference / "run", run)
    return "refused" if is_unreported else "harmless"


def trials(count: int, references: Path, short: bool) -> Iterator[Trial]:
    """Yield each kind of damage to each file and folder of the victim; a random sample if `count` is smaller."""
    victim = references / VICTIM
    run = victim / "run"
    paths = sorted(path.relative_to(run) for path in run.rglob("*"))
    ways: list[tuple[str, ...]] = [(), (FALLBACK,)]
    every = [
        (str(path), damage, more)
        for more in ways
        for path in paths
        for damage in (ON_FOLDERS if (run / path).is_dir() else ON_FILES)
        if path.parts[0] == "checkpoints" or not (more or (short and path.parts[0] == "report"))
    ]
    random.Random(count).shuffle(every)
    for name, damage, more in every[:count]:
        work = partial(
            resume_damaged,
            victim=victim,
            name=name,
            damage=(ON_FOLDERS if (run / name).is_dir() else ON_FILES)[damage],
            reference=references / "1-sync",
            more=more,
        )
        row = ", ".join([damage.partition(" at ")[0], *more])
        yield Trial("damage", row, " ".join([name, damage, *more]), work)
