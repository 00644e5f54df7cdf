"""Texts on the command line that Hydra's grammar would read as numbers, such as run_dir=2024_01_05."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from trainer.config.on_checkpoint import KEY
from trainer.shell.commands import hydra_quoted

_LIST_OF_LOGGERS = re.compile(r"logger=\[([^\[\]]*[^\s\[\]][^\[\]]*)\]")


def keep_texts(overrides: Sequence[str], schema: type) -> list[str]:
    """Return the overrides; a value that is no text, for a key that takes a text, is quoted for Hydra as typed.

    Without the quotes Hydra reads 2024_01_05 as the number 20240105, because it does not have the type of the key.
    """
    return [_keep_text(override, schema) for override in overrides]


def readable(arguments: Iterable[str]) -> list[str]:
    """Return the arguments of a command line in the forms that Hydra reads.

    A command that its grammar refuses, as for its `{path}`, is quoted as typed. A list of loggers becomes the choice of
    the first one, and a list of the others.
    """
    return [one for argument in arguments for one in _several_loggers(_quote_command(argument))]


def _several_loggers(override: str) -> list[str]:
    found = _LIST_OF_LOGGERS.fullmatch(override)
    if found is None:
        return [override]
    first, *others = (name.strip() for name in found[1].split(","))
    return [f"logger={first}", f"logger.also=[{','.join(others)}]"]


def _quote_command(override: str) -> str:
    key, _, typed = override.partition("=")
    if key.lstrip("+") != KEY:
        return override
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return f"{key}={hydra_quoted(typed)}"
    return override


def _keep_text(override: str, schema: type) -> str:
    key, _, typed = override.partition("=")
    kind = type_of(schema, key.lstrip("+"))
    takes_text = kind is str or (str in get_args(kind) and get_origin(kind) is not list)
    if override.startswith("-") or not takes_text:
        return override
    try:
        value = OverridesParser.create().parse_override(override).value()
    except HydraException:
        return override  # Hydra refuses it when it composes
    fits = type(value) is int and int in get_args(kind)
    return override if fits or not isinstance(value, bool | int | float) else f"{key}={hydra_quoted(typed)}"


_types = cache(get_type_hints)
"""Types of the fields of a dataclass. To resolve them takes 0.2 ms, so it is done once for each class."""


def type_of(schema: type, key: str) -> object:
    """Return the type of a key of a dataclass, such as `list[float]`; None if there is no such key."""
    kind: object = schema
    for name in key.split("."):
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            return None
        kind = _types(kind).get(name)
    return kind
