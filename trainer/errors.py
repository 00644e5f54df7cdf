"""The errors that a command prints as one line, and the exit codes."""

from collections.abc import Iterator
from contextlib import contextmanager

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75
"""A signal stopped the run after its state was saved; `resume=RUN_DIR` continues it."""

LONGEST_REASON = 300
"""Characters of a foreign error's message that are printed; of a longer one, the first line up to this length."""


class ConfigError(Exception):
    """Bad input: one line that names the key or the file and what was expected."""


class NotSaved(Exception):
    """A checkpoint could not be written; every rank raises it, and the checkpoints before are untouched."""


class NonFiniteStep(Exception):
    """A step was not finite and `trainer.non_finite=stop`; every rank raises it."""


@contextmanager
def blamed_on(key: str) -> Iterator[None]:
    """Raise any error inside as a ConfigError that begins with `key`; a ConfigError passes as it is."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = _reason(error).removeprefix(f"{key}: ")
        raise ConfigError(f"{key}: {reason}") from error


def _reason(error: Exception) -> str:
    """One line of a foreign error. A ValueError speaks of the value that was given, any other also has its class."""
    message = " ".join(str(error).split())
    if len(message) > LONGEST_REASON:
        message = " ".join(str(error).strip().splitlines()[0].split())[:LONGEST_REASON]
    if isinstance(error, ValueError) and message:
        return message
    named = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return f"{named} (HYDRA_FULL_ERROR=1 shows where)"
