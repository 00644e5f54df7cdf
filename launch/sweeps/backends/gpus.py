"""The GPUs of this machine, and locks by which the sweeps of a user share them: one file per GPU. No torch here."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from trainer.errors import ConfigError
from trainer.rundir.files import check_own_folder
from trainer.rundir.lock import take_file_lock


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as names for CUDA_VISIBLE_DEVICES.

    torch is not used for this, because its import takes seconds.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",") if name.strip()]
        # CUDA ignores -1 and what follows.
        return list(takewhile(lambda name: not name.startswith("-"), names))
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    count = sum(line.startswith("GPU ") for line in listed.splitlines())
    return list(map(str, range(count)))


def lock_folder() -> Path:
    """Return the user's folder of GPU locks, which is made if missing.

    It is not in XDG_RUNTIME_DIR, which cron and containers do not set and which a logout deletes: a sweep with it and
    one without it would not see each other's locks.

    Raises:
        ConfigError: The folder is a link or belongs to another user, who could then hold up every sweep.
    """
    folder = Path(tempfile.gettempdir()) / f"polyak-gpus-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: expected a folder for the locks of GPUs: {error.strerror}") from error
    check_own_folder(folder)
    if folder.stat().st_uid != os.getuid():
        raise ConfigError(f"{folder}: expected a folder of this user; set TMPDIR to another place")
    return folder


def take_gpus(preferred: Sequence[str], count: int) -> dict[str, int] | None:
    """Lock the first `count` free GPUs for a run; return the descriptor of each lock, or None if too few are free.

    The GPUs are tried in the order of `preferred`. The kernel releases a lock when every process that inherited its
    descriptor has ended. A GPU counts as another one if another sweep names it differently (by its number or by its
    UUID).
    """
    folder = lock_folder()
    taken: dict[str, int] = {}
    for gpu in preferred:
        if len(taken) == count:
            break
        descriptor = take_file_lock(folder / f"{re.sub(r'[^A-Za-z0-9-]', '_', gpu)}.lock")
        if descriptor is not None:
            taken[gpu] = descriptor
    if len(taken) == count:
        return taken
    release(taken)
    return None


def release(taken: dict[str, int]) -> None:
    """Close this process's descriptors of locks; a process that inherited one goes on holding it."""
    for descriptor in taken.values():
        os.close(descriptor)
