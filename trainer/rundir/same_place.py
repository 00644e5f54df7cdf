"""Whether the run directory is still at its path: a run never makes it again after it was moved or deleted."""

import os
from pathlib import Path

from trainer.errors import NotSaved


class SamePlace:
    """A run directory and places in it, as they were at the start or, if they were made later, at the first check."""

    def __init__(self, run_dir: Path, *inside: Path) -> None:
        """Remember the directory, which must exist, and files or folders in it."""
        self._identities = {path: _identity(path) for path in (run_dir, *inside)}

    def check(self) -> None:
        """Compare the places with the remembered ones; make nothing.

        Raises:
            NotSaved: A place is missing, or something else has its path.
        """
        for path, before in self._identities.items():
            now = _identity(path)
            if before is None:
                self._identities[path] = now
            elif now != before:
                what = "something else has its path" if now else "nothing is at its path"
                raise NotSaved(
                    f"{path} was moved, deleted or unmounted while the run was writing: {what};"
                    " what was written before is at the new place"
                )


def _identity(path: Path) -> tuple[int, int] | None:
    """Return device and inode of a file or folder; None if it is missing or cannot be reached."""
    try:
        status = os.stat(path)
    except OSError:  # also a stale handle of a network file system
        return None
    return status.st_dev, status.st_ino
