"""Cut the power of a run: copy the image of its mounted ext4 at a moment, replay its journal, and resume from it.

What is not on the disk at that moment is lost, as the image is copied without a sync. A committed checkpoint and its
records must be there.
"""

import json
import os
import random
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.chaos.disk import mounted
from tests.chaos.hook import STEP
from tests.chaos.kills import go_on, overrides, saving
from tests.chaos.ledger import Skipped, Trial, Wrong
from tests.chaos.shared import Arm, expect_equal, reached, run_here

IMAGE_BYTES = 24 << 20
MOMENTS = {
    "in training": STEP,
    "writing tensors": "writing tensors",
    "before the commit": "before the commit",
    "between rename and marker": "between rename and marker",
    "pruning": "pruning",
}
EVENTS = {"in training": 12}


def make_image(path: Path) -> None:
    """Make the image of an empty ext4.

    Raises:
        Skipped: This machine has no mkfs.ext4.
    """
    path.touch()
    os.truncate(path, IMAGE_BYTES)
    words = ["mkfs.ext4", "-q", "-F", str(path)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Skipped("no mkfs.ext4 here") from None
    if done.returncode:
        raise Skipped(f"mkfs.ext4: {done.stderr.strip()[:200]}")


def cut(chance: random.Random, *, moment: str, reference: Path, is_async: bool) -> str:
    """Copy the image at an event of a phase, and resume from the copy."""
    image, copy = Path("image").absolute(), Path("copy").absolute()
    make_image(image)
    events = EVENTS.get(moment) or json.loads((reference / "counts").read_text())[moment]
    arm = Arm(
        MOMENTS[moment], chance.randint(max(1, events // 3), events), "copy_image", (str(image), str(copy))
    )
    with mounted("-o", "loop", str(image), at=Path("disk").absolute()):
        run_here(*overrides(1, is_async), "run_dir=run", arm=arm).expect(0)
        if not arm.was_hit():
            raise Wrong("the moment was not hit")
    committed = json.loads(copy.with_name("copy.json").read_text())
    with mounted("-o", "loop", str(copy), at=Path("afterwards").absolute()):
        newest = int(committed[-1].removeprefix("step-")) if committed else 0
        if reached(Path("run")) < newest:
            raise Wrong(f"step {newest} was committed, and step {reached(Path('run'))} is there")
        go_on(1, is_async).expect(0)
        expect_equal(reference / "run", Path("run"))
    return "equal"


def trials(count: int, references: Path, short: bool) -> Iterator[Trial]:
    """Yield cuts at each moment, with both ways of saving."""
    for number in range(count):
        # While a thread saves, a marker that is there need not be on the disk in a moment of training.
        moment = list(MOMENTS)[(number + (2 if short else 0)) % len(MOMENTS)]
        is_async = moment != "in training" and number % 2 == 1 and not short
        reference = references / ("1-async" if is_async else "1-sync")
        work = partial(cut, moment=moment, reference=reference, is_async=is_async)
        row = ", ".join(["ext4 image copied", *saving(is_async)])
        yield Trial("power", row, f"{number} {moment}", work, moment)
