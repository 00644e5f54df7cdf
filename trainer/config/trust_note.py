"""Say beside a printed command that it needs `allow_targets`, without what to allow. Imports no torch."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from trainer.config.own_code import is_trusted


def trust_note(config: Mapping[str, Any], groups: Collection[str], allowed: Sequence[str] = ()) -> str:
    """Return a note for the title of a command whose `allow_targets` is left out; empty if it needs none.

    No entry is printed: what a run directory names is not to be trusted by copying a line.

    Args:
        config: configuration of the run, as read, perhaps of a stranger.
        groups: groups that the command builds.
        allowed: entries that the user allowed, which the command has.
    """
    if is_trusted(config, allowed, groups):
        return ""
    return " (the run's own code needs allow_targets= too; the refusal has the words)"
