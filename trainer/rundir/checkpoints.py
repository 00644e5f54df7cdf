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
    try:
        paths = list(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read ({error.strerror})") from error
    named = [path for path in paths if (match := FOLDER.fullmatch(path.name)) and not match[2]]
    # A marker that is no regular file counts too: `read_marker` refuses it, nothing is skipped silently.
    checkpoints = [path for path in named if os.path.lexists(path / MARKER)]
    return sorted(checkpoints, key=lambda path: (step_of(path), path))


def saved_step(run_dir: Path) -> int | None:
    """Return the step of the newest checkpoint of a run, None without a checkpoint."""
    checkpoints = committed(run_dir / "checkpoints")
    return step_of(checkpoints[-1]) if checkpoints else None
