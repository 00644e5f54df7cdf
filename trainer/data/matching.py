"""Find the files that a config key names."""

import os
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path

from trainer.errors import ConfigError


def matching_files(paths: str | Sequence[str], origin: str) -> list[str]:
    """Return the files that paths and glob patterns name, those of a pattern sorted.

    A file that a pattern matches is there once, whatever else names it or links to it: the rows of a file that is there
    twice would be in both splits. A path that is written twice is read twice.

    Raises:
        ConfigError: An entry is no path, or matches no file; the message begins with `origin`, a config key.
    """
    patterns = [paths] if isinstance(paths, str) else list(paths)
    files: list[str] = []
    named: set[str] = set()
    matched: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ConfigError(f"{origin}: {pattern!r} is not a path")
        is_pattern = has_magic(pattern) and not Path(pattern).is_file()
        found = sorted(glob(pattern, recursive=True)) if is_pattern else [pattern]
        if not found:
            raise ConfigError(f"{origin}: {pattern} matches no file")
        for file in found:
            place = os.path.realpath(file)
            if place not in (named if is_pattern else matched):
                files.append(file)
                named.add(place)
                matched |= {place} if is_pattern else set()
    if not files:
        raise ConfigError(f"{origin}: is empty, expected a path or a list of paths")
    return files
