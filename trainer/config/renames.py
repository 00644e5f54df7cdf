"""The rules of `init.rename`: regular expressions that change the names of a source's tensors. Imports no torch."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.errors import ConfigError

KEY = "init.rename"
_ARROW = re.compile(r"\s*->\s*")
Renames = Sequence[tuple[re.Pattern[str], str]]


def parse_renames(rules: Any) -> Renames:
    """Return pattern and replacement of each rule.

    `rules` is a list of texts `pattern -> replacement`, a mapping from pattern to replacement, or None.

    Raises:
        ConfigError: A rule has another form, or its pattern is no regular expression.
    """
    if isinstance(rules, Mapping):
        pairs = list(rules.items())
    elif isinstance(rules, list | tuple):
        pairs = [_split(rule) for rule in rules]
    elif rules is None:
        pairs = []
    else:
        raise ConfigError(f"{KEY}: expected a list of 'pattern -> replacement', got {rules!r:.100}")
    compiled = []
    for pattern, replacement in pairs:
        if not isinstance(pattern, str) or not isinstance(replacement, str | None):
            raise ConfigError(f"{KEY}: expected two texts, got {pattern!r:.100} and {replacement!r:.100}")
        try:
            compiled.append((re.compile(pattern), replacement or ""))
        except re.error as error:
            raise ConfigError(f"{KEY}: {pattern!r:.100} is no regular expression: {error}") from error
    return compiled


def _split(rule: Any) -> tuple[str, str]:
    parts = _ARROW.split(rule) if isinstance(rule, str) else []
    if len(parts) != 2 or not parts[0]:
        raise ConfigError(f"{KEY}: expected 'pattern -> replacement', got {rule!r:.100}")
    return parts[0], parts[1]


def renamed(name: str, renames: Renames) -> str:
    """Return the name after every rule, in their order.

    Raises:
        ConfigError: A replacement names a group that its pattern does not have.
    """
    for pattern, replacement in renames:
        try:
            name = pattern.sub(replacement, name)
        except (re.error, IndexError) as error:
            raise ConfigError(f"{KEY}: {pattern.pattern!r} -> {replacement!r}: {error}") from error
    return name
