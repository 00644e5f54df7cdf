"""Which folders of a run are committed checkpoints. Nothing here imports torch."""

import os
import re
from pathlib import Path

from trainer.errors import ConfigError

MARKER = "COMMIT.json"
SCALARS = "state.json"
FOLDER = re.compile(r"step-(\d{8,})(\.tmp)?")


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def committed(folder: Path) -> list[Path]:
    """Return the committed checkpoints in a folder, sorted by step; none if there is no such folder.

    Raises:
        ConfigError: The folder cannot be listed.
    """
    checkpoints = []
    try:
        paths = list(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read ({error.strerror})") from error
    for path in paths:
        match = FOLDER.fullmatch(path.name)
        # A marker that is no regular file counts too: `read_marker` refuses it, nothing is skipped silently.
        if match and not match[2] and os.path.lexists(path / MARKER):
            checkpoints.append((int(match[1]), path))
    return [path for _, path in sorted(checkpoints)]


def saved_step(run_dir: Path) -> int | None:
    """Return the step of the newest checkpoint of a run, None without a checkpoint."""
    checkpoints = committed(run_dir / "checkpoints")
    return step_of(checkpoints[-1]) if checkpoints else None
