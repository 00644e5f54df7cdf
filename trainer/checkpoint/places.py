"""The places of the checkpoints in their folder: clear the way for a new one, and delete old ones.

Only what a save of this program wrote is deleted. A file, a link or a foreign folder with a checkpoint's name is
renamed to `step-00000500.stale-1`, which is no checkpoint's name. It is never followed.
"""

import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable
from pathlib import Path

from trainer.errors import ConfigError
from trainer.rundir.checkpoints import FOLDER, MARKER, SCALARS, committed
from trainer.rundir.files import sync_directory

_OWN_FILE = re.compile(rf"__\d+_\d+\.distcp|\.metadata(\.tmp)?|{re.escape(SCALARS)}|\..*\.tmp")


def set_aside(place: Path, fault: str) -> Iterable[str]:
    """Rename an entry with a checkpoint's name, which is then no checkpoint; return a warning with its fault."""
    number = 1
    while os.path.lexists(stale := place.with_name(f"{place.name}.stale-{number}")):
        number += 1
    place.rename(stale)
    return (f"warning: {place} {fault}; it is renamed to {stale.name}",)


def clear_way(path: Path, aside: Path) -> list[str]:
    """Remove leftovers of a crash, rename what is no checkpoint, and make the temporary folder.

    Args:
        path: checkpoint to write, not committed yet. Its folder is made if missing, in a folder that exists.
        aside: temporary folder to make, beside it.

    Returns:
        Warnings: what was renamed, and what could not be deleted and is not in the way.

    Raises:
        OSError: `path` or `aside` cannot be freed, or the folder cannot be written.
    """
    folder = path.parent
    if not folder.is_dir():
        folder.mkdir()  # without parents: if the run directory was moved, nothing is made in its place
        sync_directory(folder.parent)  # a power cut must not remove the folder with a committed checkpoint
    warnings: list[str] = []
    for name in sorted(os.listdir(folder)):
        if not FOLDER.fullmatch(name):
            continue
        place = folder / name
        try:
            warnings += _clear(place, in_the_way=place in (path, aside))
        except OSError as error:
            if place in (path, aside):
                raise
            warnings.append(
                f"warning: {place} cannot be removed: {error.strerror}; the next save tries again"
            )
    aside.mkdir()
    return warnings


def _clear(place: Path, *, in_the_way: bool) -> Iterable[str]:
    """Delete or rename one entry with a checkpoint's name, unless it is a checkpoint; return warnings."""
    if not stat.S_ISDIR(place.lstat().st_mode):
        return set_aside(place, "is no folder")
    try:
        names = os.listdir(place)
    except OSError as error:
        return set_aside(place, f"cannot be read: {error.strerror}") if in_the_way else ()
    if MARKER in names and place.suffix != ".tmp":
        return set_aside(place, f"has a {MARKER} that is no file") if in_the_way else ()
    if not all(name == MARKER or _OWN_FILE.fullmatch(name) for name in names):
        return set_aside(place, "has files that are no part of a checkpoint")
    try:
        shutil.rmtree(place)
    except OSError as error:
        if not in_the_way:
            raise
        return set_aside(place, f"cannot be deleted: {error.strerror}")
    return ()


def prune(folder: Path, newest: Path, keep: int, held: Collection[Path] = ()) -> list[str]:
    """Delete old checkpoints, oldest first; keep `newest`, the `keep - 1` newest others, and those in `held`.

    Returns:
        Warnings about checkpoints that cannot be deleted; they stay, and the next save tries again. The text has no
        step, so that a caller can show it once.
    """
    warnings: dict[str, None] = {}
    try:
        others = [path for path in committed(folder) if path != newest and not path.is_symlink()]
    except ConfigError as error:
        return [f"warning: old checkpoints are kept: {error}"]
    old = others[: max(0, len(others) - (keep - 1))]
    for path in (path for path in old if path not in held):
        try:
            # The marker first: after a crash in between the folder counts as no checkpoint.
            (path / MARKER).unlink()
            sync_directory(path)
            shutil.rmtree(path)
        except OSError as error:
            warnings[f"warning: {folder}: an old checkpoint cannot be deleted: {error.strerror}"] = None
    return list(warnings)
