"""Common behaviour of the commands of `launch`: help, `KEY=VALUE` arguments, error lines, exit codes. No torch."""

import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from launch.sweeps.directory import SWEEP
from trainer.cli import run_command
from trainer.config.schema import Config
from trainer.distributed.torchrun import complain
from trainer.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, ConfigError, near, unknown_key
from trainer.rundir.directory import META, METRICS
from trainer.rundir.files import looks_like_file
from trainer.shell.commands import named_as_used

LONGEST_NUMBER = 12
"""Largest number of digits of a whole number in an argument."""
LONGEST_VALUE = 300
"""Largest number of characters of a value in a message."""
FILES = (".csv", ".html", ".json", ".md", ".pdf", ".png", ".svg", ".txt")
"""Suffixes of files that may be meant by the name of a directory for results."""
BROKEN_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""Errors of the operating system that are no bad input."""


def command(arguments: Sequence[str], help_text: str, work: Callable[[], int]) -> int:
    """Print the help if `--help` is given, else run `work`; return the exit code.

    Without arguments, print the help on standard error and return 2. A ConfigError of `work` is printed as one line,
    with the traceback if `HYDRA_FULL_ERROR=1` is set.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(named_as_used(help_text), end="", file=sys.stdout if arguments else sys.stderr)
        return EXIT_DONE if arguments else EXIT_BAD_INPUT
    return run_command(lambda: naming_files(work), arguments)


def naming_files(work: Callable[[], int]) -> int:
    """Run `work`; raise an error of the operating system about a file as a ConfigError that names the file.

    A full or broken disk is no bad input, so its error is printed and the exit code is 1.
    """
    try:
        return work()
    except OSError as error:
        if error.filename is None:
            raise
        named = ConfigError(f"{str(error.filename)[:LONGEST_VALUE]}: {error.strerror}")
        named.__cause__ = error
        if error.errno in BROKEN_DISK:
            complain(named)
            return EXIT_FAILED
        raise named from error


def split_arguments(arguments: Iterable[str], keys: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the `KEY=VALUE` arguments whose key is in `keys` as a mapping, and all other arguments.

    Raises:
        ConfigError: A key is given twice.
    """
    own: dict[str, str] = {}
    rest = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in keys:
            rest.append(argument)
        elif key in own:
            raise ConfigError(f"{key}: expected once, got {own[key]} and {value}")
        else:
            own[key] = value
    return own, rest


def split_overrides(arguments: Sequence[str], keys: Sequence[str]) -> tuple[Path, dict[str, str], list[str]]:
    """Return the run directory, the command's own arguments by key, and the overrides of the run's configuration.

    Raises:
        ConfigError: The run directory is not first, another argument is none of these, or a key is given twice or
            mistyped.
    """
    own, overrides = split_arguments(arguments[1:], keys)
    for argument in overrides:
        if argument.startswith("-") or not ("=" in argument or argument.startswith("~")):
            raise ConfigError(f"{argument}: expected RUN_DIR first and then KEY=VALUE; see --help")
    refuse_mistyped(overrides, keys)
    return Path(arguments[0]), own, overrides


def refuse_mistyped(words: Iterable[str], keys: Sequence[str]) -> None:
    """Refuse a word KEY=VALUE whose key is like one of the command's `keys`, and no key of the configuration.

    Raises:
        ConfigError: There is one; names it and the key that it is like.
    """
    known = {field.name for field in fields(Config)}
    for key in _keys_of(words):
        if key.partition(".")[0] not in known and near(key, keys):
            raise ConfigError(unknown_key(key, keys))


def refuse_no_path(words: Iterable[str], keys: Sequence[str]) -> None:
    """Refuse a word KEY=VALUE among paths, unless it is a path; `keys` are those of the command.

    Raises:
        ConfigError: There is one; names its key and the key that it is like.
    """
    for key in _keys_of(word for word in words if not os.path.exists(word)):
        raise ConfigError(unknown_key(key, keys))


def _keys_of(words: Iterable[str]) -> Iterator[str]:
    for word in words:
        if (found := re.match(r"[+~]*([\w.]+)=", word)) is not None:
            yield found[1]


def split_run_dir(arguments: Sequence[str], keys: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """Return the only run directory and the other arguments by key.

    Raises:
        ConfigError: A key is unknown or given twice, or the arguments do not have one run directory.
    """
    own, rest = split_arguments(arguments, keys)
    refuse_no_path(rest, keys)
    if len(rest) != 1 or rest[0].startswith("-"):
        raise ConfigError(f"expected one run directory, got {' '.join(rest) or 'none'}; see --help")
    return Path(rest[0]), own


def parse_result(own: Mapping[str, str]) -> Path | None:
    """Return the file in `out=` for the result of a command; None without it.

    Raises:
        ConfigError: The value is empty or names a folder.
    """
    if (text := own.get("out", "file")) == "" or text.endswith("/"):
        raise ConfigError(f"out: expected a file to make, got {text or 'nothing'}")
    return Path(own["out"]).absolute() if "out" in own else None


def parse_folder(own: Mapping[str, str]) -> Path | None:
    """Return the directory in `out=` for the results of a command, new or existing; None without it.

    Raises:
        ConfigError: The value is empty, a file or named as one, or a run or a sweep, whose files are its own.
    """
    if (text := own.get("out")) is None:
        return None
    path = Path(text)
    if not text or (path.exists() and not path.is_dir()):
        raise ConfigError(f"out: expected a directory, got {text or 'nothing'}")
    if looks_like_file(text, FILES) and not path.is_dir():
        raise ConfigError(f"out: expected a directory, got {text}; {text}/ makes one of this name")
    if any((path / name).exists() for name in (META, METRICS, SWEEP)):
        raise ConfigError(f"out: expected a directory of its own, {text} is that of a run or a sweep")
    return path


def make_folder(path: Path) -> None:
    """Make the directory of `out=`, before the work whose results it gets.

    Raises:
        ConfigError: It cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        if error.errno in BROKEN_DISK:
            raise
        raise ConfigError(f"out: {path} cannot be written: {error.strerror}") from error


def parse_step(text: str, *, best: bool = True) -> str | int:
    """Return the parsed value of `step=`: last, best (if that is allowed), or a number of optimizer steps.

    Raises:
        ConfigError: The value is none of these.
    """
    names = ("last", "best") if best else ("last",)
    if text in names:
        return text
    if text.isascii() and text.isdecimal() and len(text) <= LONGEST_NUMBER:
        return int(text)
    expected = f"{', '.join(names)} or a number of steps"
    raise ConfigError(f"step: expected {expected}, got {text[:LONGEST_VALUE]!r}")


def parse_count(key: str, text: str) -> int:
    """Return the value of `key=`, a whole number of at least 1.

    Raises:
        ConfigError: The value is no such number.
    """
    if text.isascii() and text.isdecimal() and len(text) <= LONGEST_NUMBER and int(text):
        return int(text)
    raise ConfigError(f"{key}: expected a whole number of at least 1, got {text[:LONGEST_VALUE]}")


def parse_targets(text: str) -> list[str]:
    """Return the prefixes in the value of `allow_targets=`; Hydra's grammar allows one prefix or a list."""
    # Imported here because importing Hydra takes longer than most commands take to finish.
    from trainer.config.compose import parse_overrides

    (override,) = parse_overrides([f"allow_targets={text}"])
    value = override.value()
    return [str(target) for target in value] if isinstance(value, list) else [str(value)]
