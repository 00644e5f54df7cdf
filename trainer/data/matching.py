"""Find the files that a config key names."""

import os
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path

from trainer.errors import ConfigError


def matching_files(paths: str | Sequence[str], origin: str) -> list[str]:
    """Return the files that paths and glob patterns name, those of a pattern sorted.

    A pattern adds no file that an entry before it has named: the rows of a file that is there twice would be in both
    splits. A path that is written twice is read twice.

    Raises:
        ConfigError: An entry is no path, or matches no file; the message begins with `origin`, a config key.
    """
    patterns = [paths] if isinstance(paths, str) else list(paths)
    files: list[str] = []
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ConfigError(f"{origin}: {pattern!r} is not a path")
        is_pattern = has_magic(pattern) and not Path(pattern).is_file()
        found = sorted(glob(pattern, recursive=True)) if is_pattern else [pattern]
        if not found:
            raise ConfigError(f"{origin}: {pattern} matches no file")
        named = set(map(os.path.abspath, files)) if is_pattern else ()
        files += [file for file in found if os.path.abspath(file) not in named]
    if not files:
        raise ConfigError(f"{origin}: is empty, expected a path or a list of paths")
    return files
