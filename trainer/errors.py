"""Errors that a command prints as one line, and the exit codes."""

import difflib
import re
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75
"""Exit code of a run that a signal stopped after its state was saved; `resume=RUN_DIR` continues it."""

LONGEST_REASON = 300
"""Largest length in characters of another library's message; of a longer one only the first line is printed."""

ALIKE = 0.6
"""Smallest likeness, from 0 to 1, of a name that is proposed for a mistyped one."""

_LIBRARIES = re.compile(r"[/\\](site|dist)-packages[/\\](torch|wandb)[/\\]")


class ConfigError(Exception):
    """Bad input; the message is one line with the key or file and the expected value."""


class NotSaved(Exception):
    """A checkpoint, the records or the report could not be written; rank 0 prints it.

    Earlier checkpoints are unchanged.
    """


class DataFailure(Exception):
    """Training data that a rank cannot read any more: a worker died or gave no batch, or the machine has failed."""


class NonFiniteStep(Exception):
    """A step that was not finite under `trainer.non_finite=stop`; every rank raises this."""


@contextmanager
def blamed_on(key: str) -> Iterator[None]:
    """Raise any error within as a ConfigError that begins with `key`; leave a ConfigError unchanged."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = _reason(error).removeprefix(f"{key}: ")
        raise ConfigError(f"{key}: {reason}") from error


@contextmanager
def below(key: str) -> Iterator[None]:
    """Put `key` in front of the message of a ConfigError, which names a key below it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def _reason(error: Exception) -> str:
    """Return another library's error as one line; only a ValueError, which is about a value, needs no class name."""
    message = message_of(error)
    if isinstance(error, ValueError) and message:
        return message
    described = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return f"{described} (HYDRA_FULL_ERROR=1 shows where)"


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return the first names as text, with the number of the others."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def near(name: str, names: Iterable[str], most: int = 1, prefix: str = "") -> str:
    """Return the end of a message that proposes the names most like a mistyped one, with `prefix`; empty without any.

    Case counts only between names that are equally like it. If names are the same behind the last full stop, all of
    these are proposed: `trainer.steps` for `steps`.
    """
    likeness = {one: _likeness(name, one) for one in names}
    ranked = sorted(likeness, key=likeness.__getitem__, reverse=True)
    last = name.lower().rpartition(".")[2]
    found = [one for one in ranked if one.lower().rpartition(".")[2] == last]
    found = found or [one for one in ranked if likeness[one][0] >= ALIKE][:most]
    return f"; did you mean {' or '.join(prefix + one for one in found)}?" if found else ""


def _likeness(typed: str, name: str) -> tuple[float, float]:
    """Return how alike two names are without case, and with it, each from 0 to 1, leaving out shared groups."""
    pairs = zip(typed.lower().split(".")[:-1], name.lower().split("."), strict=False)
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    typed, name = (".".join(text.split(".")[shared:]) for text in (typed, name))
    without_case = difflib.SequenceMatcher(None, name.lower(), typed.lower()).ratio()
    return without_case, difflib.SequenceMatcher(None, name, typed).ratio()


def unknown_key(key: str, keys: Sequence[str]) -> str:
    """Return the message for a key that is none of these, with the one most like it, or with all."""
    return f"{key}: unknown key" + (near(key, keys) or f"; expected {', '.join(keys) or 'no KEY=VALUE'}")


def shown_key(key: str) -> str:
    """Return a key for a message; one that may be read as more than a key, as a stranger may choose it, is quoted."""
    return key if re.fullmatch(r"[\w.+\[\]-]+", key) else repr(key)


def place_of(error: BaseException) -> str:
    """Return file and line of the last frame outside torch and wandb, which hooks `sys.exit`."""
    frames = traceback.extract_tb(error.__traceback__)
    last = ([frame for frame in frames if not _LIBRARIES.search(frame.filename)] or frames)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def message_of(error: BaseException) -> str:
    """Return the message of another library's error as one line of at most LONGEST_REASON characters."""
    faults = getattr(error, "errors", None)
    if type(error).__module__.startswith("pydantic") and callable(faults):
        found = (
            f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in faults()
        )  # without links and types
        return " ".join("; ".join(found).split())[:LONGEST_REASON]
    message = " ".join(str(error).split())
    if len(message) > LONGEST_REASON:
        message = " ".join(str(error).strip().splitlines()[0].split())[:LONGEST_REASON]
    return message
