"""The command of `trainer.on_checkpoint`: its fields, its words, and the entry of `allow_targets` that trusts it.

A run directory may come from a stranger, and its frozen configuration with it. So a command runs only if it was typed
on this command line, or if `allow_targets` has its entry.
"""

import shlex
from string import Formatter

KEY = "trainer.on_checkpoint"
FIELDS = ("path", "step", "run_dir")
"""Fields that a command may have."""


def is_command(text: str) -> bool:
    """Return whether a text is a command line whose only fields are `FIELDS`."""
    try:
        words = shlex.split(text)
        pieces = [piece for word in words for piece in Formatter().parse(word)]
    except ValueError:
        return False
    names = [
        name + (spec or "") + (conversion or "") for _, name, spec, conversion in pieces if name is not None
    ]
    return bool(words) and "\0" not in text and all(name in FIELDS for name in names)


def words_of(text: str, *, path: str, step: int, run_dir: str) -> list[str]:
    """Return the words of a command with its fields filled in; a value is always part of one word."""
    return [word.format(path=path, step=step, run_dir=run_dir) for word in shlex.split(text)]


def trusting(text: str) -> str:
    """Return the entry of `allow_targets` that allows this command and no other."""
    return f"on_checkpoint={text}"


def is_trust(text: str) -> bool:
    """Return whether a text is an entry that `trusting` returns for a command."""
    command = text.removeprefix(trusting(""))
    return command != text and text.isprintable() and is_command(command)
