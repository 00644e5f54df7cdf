"""Find what of a configuration only `allow_targets` allows, so that one message names all of it. Imports no torch.

`trainer.config.trust` decides about each target when it is resolved; nothing here allows anything.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from trainer.config.on_checkpoint import KEY as COMMAND_KEY
from trainer.config.on_checkpoint import trusting
from trainer.config.schema import Config
from trainer.config.trust import RULE_KEY, RUNS_CODE, TARGETS, WRAPPERS, is_within, leaves
from trainer.errors import ConfigError
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
_TARGET = re.compile(
    r"(model|task|data)\b.*\._target_|(sharding|optimizer|schedule|logger)\._target_|logger\.also\[\d+\]"
    r"|(optimizer\.groups|metrics|callbacks)\.[^.]+\._target_"
    rf"|({RULE_KEY.pattern})(\._target_)?"
)
"""Pattern of the keys that name a class or a function."""
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def refuse_untrusted(config: Config, allowed: Sequence[str], groups: Collection[str]) -> None:
    """Refuse all that these groups may not run, at once, with the whole `allow_targets` that would allow it.

    If it is one thing alone, the place that would run it refuses it.

    Args:
        config: configuration, perhaps of a stranger.
        allowed: entries of `allow_targets`, and what was typed on this command line.
        groups: groups that the command builds.

    Raises:
        ConfigError: Something is not allowed; names its keys.
    """
    own = dict(_own(asdict(config), groups))
    refused = [key for key, what in own.items() if _entry(what, allowed) is None]
    proposed = [_entry(what, allowed) or _proposed(what) for what in own.values()] + _factories(config.model)
    entries = [
        one
        for one in dict.fromkeys(proposed)
        if not any(one != other and _covers(other, one) for other in proposed)
    ]
    if refused and len(entries) > 1:
        raise ConfigError(
            f"{', '.join(refused)}: not allowed by this command line; if you trust this code, add"
            f" {shell_quoted(trust(entries))}"
        )


def has_own(config: Mapping[str, Any], groups: Collection[str]) -> bool:
    """Return whether a command that builds these groups of a configuration, as read, needs `allow_targets`."""
    return any(_own(config, groups)) or bool(_factories(config.get("model")))


def needed(config: Mapping[str, Any], allowed: Sequence[str], groups: Collection[str]) -> list[str]:
    """Return the entries of `allowed` that a command needs which builds these groups of a configuration, as read."""
    entries = [_entry(what, allowed) for _, what in _own(config, groups)]
    entries += [path for path in _factories(config.get("model")) if path in allowed]
    return list(dict.fromkeys(entry for entry in entries if entry is not None))


def _own(config: Mapping[str, Any], groups: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the key of each thing that no built-in prefix allows, and its path, argument name or trusting entry."""
    for group in groups:
        prefixes, _ = TARGETS.get(group, ((), {}))
        for key, value in leaves(group, config.get(group)):
            name = key.rpartition(".")[2]
            if isinstance(value, str) and _TARGET.fullmatch(key) and _DOTTED.fullmatch(value):
                if not is_within(value, prefixes):
                    yield key, value
            elif group == "model" and name in RUNS_CODE and RUNS_CODE[name](value):
                yield key, name
            elif key == COMMAND_KEY and value is not None:
                yield key, trusting(value)


def _factories(model: Any) -> list[str]:
    """Return the paths of functions of libraries that make the model, each of which only its whole path allows.

    Nothing is imported to see whether a path is that of a function: classes have capitals.
    """
    prefixes, _ = TARGETS["model"]
    paths = (value for key, value in leaves("model", model) if key.endswith("._target_"))
    return [
        path
        for path in paths
        if is_within(path, prefixes) and path not in WRAPPERS and path.rpartition(".")[2][:1].islower()
    ]


def _entry(what: str, allowed: Sequence[str]) -> str | None:
    """Return the entry of `allowed` that allows this; None without one."""
    return what if what in allowed else next((one for one in allowed if _covers(one, what)), None)


def _covers(entry: str, what: str) -> bool:
    return bool(_DOTTED.fullmatch(what)) and is_within(what, [entry])


def _proposed(what: str) -> str:
    return f"{what.partition('.')[0]}." if _DOTTED.fullmatch(what) else what
