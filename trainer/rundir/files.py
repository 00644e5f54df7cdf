"""Whole files or none: a reader, and a crash at any moment, meet the old file or the new one."""

import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from trainer.errors import ConfigError


def open_own(path: Path, flags: int) -> int:
    """Open a file that belongs to its folder; a link there could lead to somebody else's.

    Raises:
        ConfigError: it is a symbolic link.
        OSError: as `os.open`.
    """
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ConfigError(f"{path}: expected a file of its own, this is a link") from None
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` (text as UTF-8), making its folder; durable when this returns."""
    _write(path, content, Path.replace)


def write_exclusively(path: Path, content: str | bytes) -> None:
    """As `write_atomically`, but `path` must not exist.

    Raises:
        FileExistsError: it exists; it is left as it was.
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
    """Make the names in a directory durable: a rename survives a power cut only once its directory is synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
