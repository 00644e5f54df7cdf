"""Write files atomically, and read small files that may come from a stranger.

After a crash, and for every reader, a written file is the old one or the new one. A file is read only if it is a
regular file of a limited size, so that reading neither waits nor fills the memory.
"""

import difflib
import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError

MAX_TEXT_BYTES = 1 << 22
"""Largest size in bytes of a file that is parsed as a whole; parsed JSON takes up to 20 times as much memory."""
MAX_YAML_VALUES = 100_000
"""Largest number of keys and values of a YAML text."""
MAX_DEPTH = 100
"""Largest number of collections inside each other, in JSON and YAML."""
LONG_SUFFIX = 8
"""Smallest length in characters, with the full stop, of a suffix that is still recognised when it is mistyped."""

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_own(path: Path, flags: int) -> int:
    """Open a regular file and return its descriptor; refuse a symbolic link, which could lead outside the folder.

    Raises:
        ConfigError: The path is a symbolic link, a pipe, a device or a directory.
        OSError: As for `os.open`.
    """
    with suppress(FileNotFoundError):  # the flags decide whether it is made
        _check_regular(path, path.lstat().st_mode)
    try:
        # Without O_NONBLOCK, opening a pipe that took the file's place waits for another process.
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ConfigError(f"{path}: expected a regular file, this is a link") from None
        raise
    return _checked(path, descriptor)


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file to read its bytes; never wait.

    Raises:
        ConfigError: The path is a pipe, a device or a directory.
        OSError: As for `os.open`.
    """
    _check_regular(path, path.stat().st_mode)  # opening some devices has effects
    return os.fdopen(_checked(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)), "rb")


def _checked(path: Path, descriptor: int) -> int:
    try:
        _check_regular(path, os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "none")
        raise ConfigError(f"{path}: expected a regular file, this is {kind}")


def check_own_folder(path: Path) -> None:
    """Refuse a folder to write into that is a symbolic link: files of another run could be replaced or deleted.

    Raises:
        ConfigError: The path is a symbolic link.
    """
    if path.is_symlink():
        raise ConfigError(f"{path}: expected a folder of its own, this is a link; replace it by a folder")


def read_text(path: Path, most: int = MAX_TEXT_BYTES) -> str:
    """Return the text of a small file, of at most `most` bytes.

    Raises:
        ConfigError: The path is no regular file, is larger than `most`, or is not UTF-8.
        OSError: The file is missing or cannot be read.
    """
    status = path.stat()
    _check_regular(path, status.st_mode)
    if status.st_size > most:
        raise ConfigError(
            f"{path}: expected at most {most >> 20} MiB, this file has {status.st_size:,} bytes"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected text in UTF-8 ({error})") from error


def read_json(path: Path, most: int = MAX_TEXT_BYTES) -> Any:
    """Return the value of a small JSON file.

    Raises:
        ConfigError: As for `read_text`, or the text is not JSON.
        OSError: As for `read_text`.
    """
    try:
        return parse_json(read_text(path, most))
    except ValueError as error:
        raise ConfigError(f"{path}: expected JSON ({error})") from error


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: The text is not JSON, or has too many levels.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("too many levels") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node)]
    if level:
        raise ValueError(f"more than {MAX_DEPTH} levels")
    return value


def _children(node: Any) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def read_yaml(path: Path) -> Any:
    """Return the plain data of a small YAML file.

    Raises:
        ConfigError: As for `read_text`, or the text is refused by `parse_yaml`.
        OSError: As for `read_text`.
    """
    try:
        return parse_yaml(read_text(path))
    except ValueError as error:
        raise ConfigError(f"{path}: expected YAML ({error})") from error


def parse_yaml(text: str) -> Any:
    """Return the plain data of a YAML text, with the C parser if present, which is ten times faster.

    Raises:
        ValueError: The text is not YAML, or `check_yaml` refuses it.
    """
    import yaml

    check_yaml(text)
    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from error


def check_yaml(text: str) -> None:
    """Refuse a YAML text that would exhaust the memory or the stack when it is parsed or used.

    Raises:
        ValueError: The text is not YAML, has aliases, which can multiply its size, too many values or too many levels.
    """
    import yaml

    depth = values = 0
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("aliases are not allowed")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            values += isinstance(event, yaml.NodeEvent)
            if depth > MAX_DEPTH or values > MAX_YAML_VALUES:
                raise ValueError(f"more than {MAX_DEPTH} levels or {MAX_YAML_VALUES} values")
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from error


def write_atomically(path: Path, content: str | bytes, *, make_folder: bool = True) -> None:
    """Replace the file by `content` (text as UTF-8); the file is on disk afterwards.

    Args:
        path: file.
        content: whole content.
        make_folder: whether a missing folder is made; its parents never are, because the user may have moved the run
            directory. False for a file of a run directory itself.

    Raises:
        OSError: The file cannot be written; its `filename` is `path`.
    """
    if make_folder:
        path.parent.mkdir(exist_ok=True)
    _write(path, content, Path.replace)


def write_exclusively(path: Path, content: str | bytes) -> None:
    """Write a new file as `write_atomically` does.

    Raises:
        FileExistsError: The file exists; it is not changed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, content, lambda aside, target: target.hardlink_to(aside))


def _write(path: Path, content: str | bytes, put: Callable[[Path, Path], object]) -> None:
    aside = path.with_name(f".{path.name}.{secrets.token_hex(3)}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        put(aside, path)
    except OSError as error:  # a full disk names no file, and `aside` is unknown to the user
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        aside.unlink(missing_ok=True)
    sync_directory(path.parent)


def looks_like_file(text: str, suffixes: Sequence[str]) -> bool:
    """Return whether a path is named as a file: with one of these suffixes, and without a slash at its end.

    Case does not count, and a long suffix may be mistyped. A short one may not: names of folders have full stops too,
    as in `gpt2-v1.5`, which is like `.h5`, or `wiki.bn`, which is like `.bin`.
    """
    suffix = Path(text).suffix.lower()
    long = [one for one in suffixes if len(one) >= LONG_SUFFIX]
    is_one = suffix in suffixes or bool(difflib.get_close_matches(suffix, long, n=1, cutoff=0.75))
    return is_one and not text.endswith("/")


def check_free(path: Path, key: str) -> None:
    """Refuse the path of a directory to make if something has it, also a dangling link.

    Raises:
        ConfigError: The path exists; the message begins with `key`.
    """
    if os.path.lexists(path):
        raise ConfigError(f"{key}: {path} exists already; expected a directory to make")


@contextmanager
def made_aside(path: Path, key: str) -> Iterator[Path]:
    """Make a directory and its parents; it gets its name after the block, so it is complete or missing.

    `key` is the config key of the path, for messages.

    Yields:
        The directory under a temporary name beside `path`; after an error it is removed.

    Raises:
        ConfigError: `path` exists, or cannot be made or written.
    """
    check_free(path, key)
    aside = path.with_name(f".{path.name[:100]}.{secrets.token_hex(3)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be made: {error.strerror}") from error
    try:
        yield aside
        check_free(path, key)  # a rename would replace an empty directory
        aside.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Sync a directory to disk; only then do renames in it survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
