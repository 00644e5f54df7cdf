"""Write files atomically: after a crash, and for every reader, a file is the old one or the new one."""

import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from trainer.errors import ConfigError


def open_own(path: Path, flags: int) -> int:
    """Open a file and return its descriptor; refuse a symbolic link, which could lead outside the folder.

    Raises:
        ConfigError: The path is a symbolic link.
        OSError: As for `os.open`.
    """
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ConfigError(f"{path}: expected a regular file, this is a link") from None
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file by `content` (text as UTF-8) and make its folder; the file is on disk afterwards."""
    _write(path, content, Path.replace)


def write_exclusively(path: Path, content: str | bytes) -> None:
    """Write a new file as `write_atomically` does.

    Raises:
        FileExistsError: The file exists; it is not changed.
    """
    _write(path, content, lambda aside, target: target.hardlink_to(aside))


def _write(path: Path, content: str | bytes, put: Callable[[Path, Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(3)}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        put(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Sync a directory to disk; only then do renames in it survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
