"""Find what of a configuration only `allow_targets` allows, so that one message names all of it. Imports no torch.

`trainer.config.trust` decides about each target when it is resolved, and nothing here allows one. A command of
`trainer.on_checkpoint` is decided about here alone.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from trainer.config.on_checkpoint import KEY as COMMAND_KEY
from trainer.config.on_checkpoint import trusting
from trainer.config.schema import Config
from trainer.config.trust import RUNS_CODE, TARGETS, WRAPPERS, is_within
from trainer.errors import ConfigError, shown_key
from trainer.shell.commands import shell_quoted, trust

EXPORTED = ("model",)
"""Groups that an export builds."""
EVALUATED = ("model", "task", "data", "metrics", "sharding")
"""Groups that an evaluation builds."""
CERTIFIED = ("model", "task", "data", "sharding", "ema", "optimizer", "schedule")
"""Groups that the short runs of a certificate build."""
PLANNED = ("model", "sharding", "ema", "optimizer")
"""Groups that a plan builds."""
TRAINED = (*EVALUATED, "ema", "optimizer", "schedule", "logger", "callbacks", "trainer")
"""Groups that a run builds."""
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def refuse_untrusted(config: Config, allowed: Sequence[str], groups: Collection[str]) -> None:
    """Refuse all that these groups may not run, at once, with the whole `allow_targets` that would allow it.

    Its words keep what was typed and add the whole path of each refused thing: that always works, and allows no more.

    Args:
        config: configuration, perhaps of a stranger.
        allowed: entries of `allow_targets`, and what was typed on this command line.
        groups: groups that the command builds.

    Raises:
        ConfigError: Something is not allowed; names its keys.
    """
    read, groups = asdict(config), [one for one in groups if one != "ema" or config.ema.enabled]
    if is_trusted(read, allowed, groups):
        return
    # A call that only a package allows may be one of a class, so it is no reason to refuse, but is refused with others.
    refused = [
        (key, what)
        for key, what in _own(read, groups)
        if what not in allowed and (_is_call(key, what) or not _is_allowed(what, allowed))
    ]
    entries = list(dict.fromkeys([*needed(read, allowed, groups), *(what for _, what in refused)]))
    keys = ", ".join(shown_key(key) for key, _ in refused)
    raise ConfigError(
        f"{keys}: not allowed by this command line; if you trust this code, add"
        f" {shell_quoted(trust(entries))}"
    )


def is_trusted(config: Mapping[str, Any], allowed: Sequence[str], groups: Collection[str]) -> bool:
    """Return whether `allowed` covers all that these groups of a configuration, as read, may not run without it."""
    return all(_is_allowed(what, allowed) for _, what in _own(config, groups))


def needed(config: Mapping[str, Any], allowed: Sequence[str], groups: Collection[str]) -> list[str]:
    """Return `allowed` without the entries that a command which builds these groups does not need.

    Those are the entries for other parts of the configuration, as read, and for parts that need none. One for no part
    stays: a class may be defined in another package than the one that its path names.
    """
    own = [what for _, what in _own(config, groups)]
    named = [what for _, what in _named(config, config)]
    return [
        entry
        for entry in dict.fromkeys(allowed)
        if any(_is_allowed(what, [entry]) for what in own)
        or not any(_is_allowed(what, [entry]) for what in named)
    ]


def _own(config: Mapping[str, Any], groups: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield what of `_named` needs an entry of `allow_targets`."""
    for key, what in _named(config, groups):
        prefixes, _ = TARGETS.get(key.partition(".")[0], ((), {}))
        if not is_within(what, prefixes) or (_is_call(key, what) and what not in WRAPPERS):
            yield key, what


def _named(config: Mapping[str, Any], groups: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the key of each thing that may run code, and its path, argument name or trusting entry."""
    for group in groups:
        for path, value in _values((group,), config.get(group)):
            key = path[0] + "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in path[1:])
            name = path[-1]
            if isinstance(value, str) and _DOTTED.fullmatch(value) and _names_target(path):
                yield key, value
            elif group == "model" and name in RUNS_CODE and RUNS_CODE[name](value):
                yield key, name
            elif key == COMMAND_KEY and value is not None:
                yield key, trusting(value)


def _values(path: tuple[Any, ...], value: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield a value and each below it, with their paths, which stay apart: a name may have a full stop."""
    yield path, value
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _values((*path, name), inner)


def _names_target(path: tuple[Any, ...]) -> bool:
    match path:
        case (
            ("model" | "task" | "data", *_, "_target_")
            | ("sharding" | "optimizer" | "schedule" | "logger", "_target_")
            | ("logger", "also", _)
            | ("optimizer", "groups", _, "_target_")
            | ("metrics" | "callbacks", _, "_target_")
            | ("ema", "rule")
            | ("ema", "rule", "_target_")
            | ("ema", "averages", _, "rule")
            | ("ema", "averages", _, "rule", "_target_")
        ):
            return True
    return False


def _is_call(key: str, what: str) -> bool:
    """Return whether this makes a model by a call of a function, which only its whole path allows.

    Nothing is imported to see that: classes have capitals.
    """
    return key.startswith("model.") and what.rpartition(".")[2][:1].islower()


def _is_allowed(what: str, allowed: Sequence[str]) -> bool:
    return what in allowed or (bool(_DOTTED.fullmatch(what)) and is_within(what, allowed))
