"""The frame of the commands of `launch`: help, `KEY=VALUE` arguments, one line for bad input, exit codes. No torch."""

import signal
import sys
from collections.abc import Callable, Iterable, Sequence

from trainer.cli import run_command
from trainer.errors import EXIT_BAD_INPUT, EXIT_DONE, ConfigError

EXIT_SIGNAL = 128
"""Added to a signal's number: the exit code after that signal, as shells have it."""


def command(arguments: Sequence[str], help_text: str, work: Callable[[], int]) -> int:
    """Answer `--help`, or do the work of a command; returns the exit code.

    Without arguments the help goes to standard error with exit code 2. A ConfigError of `work` becomes one line;
    `HYDRA_FULL_ERROR=1` adds the traceback.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(help_text, end="", file=sys.stdout if arguments else sys.stderr)
        return EXIT_DONE if arguments else EXIT_BAD_INPUT
    return interruptible(work)


def interruptible(work: Callable[[], int]) -> int:
    """Do the work of a command; bad input and Ctrl-C become one line each. Returns the exit code."""
    try:
        return run_command(work)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_SIGNAL + signal.SIGINT


def split_arguments(arguments: Iterable[str], keys: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Separate `KEY=VALUE` arguments whose key is in `keys` from the other arguments.

    Raises:
        ConfigError: a key is given twice.
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


def parse_step(text: str) -> str | int:
    """Parse `step=`: last, best, or a number of optimizer steps.

    Raises:
        ConfigError: it is none of these.
    """
    if text in ("last", "best"):
        return text
    if text.isascii() and text.isdecimal():
        return int(text)
    raise ConfigError(f"step: expected last, best or a number of steps, got {text!r}")


def parse_targets(text: str) -> list[str]:
    """Parse the value of `allow_targets=` by Hydra's grammar: one prefix or a list of them."""
    from trainer.config.compose import (
        parse_overrides,
    )  # Hydra takes longer to import than a command to answer

    (override,) = parse_overrides([f"allow_targets={text}"])
    value = override.value()
    return [str(target) for target in value] if isinstance(value, list) else [str(value)]
