"""Which checkpoints are merged, and in which order: patterns of paths, and the steps in their names. No torch here."""

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from trainer.errors import ConfigError, listed
from trainer.rundir.directory import is_run_directory

_NUMBER = re.compile(r"\d+")
_STEP = re.compile(r"(?:step|iter|iteration)s?[-_=]?(\d+)", re.IGNORECASE)
_SET_ASIDE = re.compile(r".*(\.tmp|\.stale-\d+)/?", re.DOTALL)
"""Path of a checkpoint of ours that was not finished, or that a run has set aside."""
_LONGEST = 18
"""Largest number of digits of a step."""


@dataclass(frozen=True)
class Snapshot:
    """One checkpoint of the command line."""

    text: str
    """Path, with `:NAME` behind it if several sets of weights are in it."""
    path: Path
    """Existing file or folder."""
    name: str | None
    """Name of the set of weights: `ema/NAME` in a checkpoint of ours, a key in a file of `torch.save`."""
    step: int | None = None
    """Step in the name; None if it is unknown."""


def find(arguments: Sequence[str]) -> list[Snapshot]:
    """Return the checkpoints that paths and patterns name; a run directory means all of its checkpoints.

    Unfinished checkpoints (`*.tmp`) and those that were set aside (`*.stale-1`) do not match a pattern.

    Raises:
        ConfigError: A path does not exist, a pattern matches nothing, or a checkpoint is named twice.
    """
    found = [one for argument in arguments for one in _expanded(argument)]
    places = [(one.path.absolute(), one.name) for one in found]
    for number, one in enumerate(found):
        if places[number] in places[:number]:
            raise ConfigError(f"{one.text} is named twice")
    return found


def _expanded(argument: str) -> list[Snapshot]:
    for end in [len(argument), *(colon.start() for colon in re.finditer(":", argument))]:
        path, name = argument[:end], argument[end + 1 :] or None
        if os.path.exists(path) and not is_run_directory(Path(path)):
            return [Snapshot(argument, Path(path), name)]
        pattern = os.path.join(glob.escape(path), "checkpoints", "step-*") if os.path.exists(path) else path
        if matches := sorted(one for one in glob.glob(pattern) if not _SET_ASIDE.fullmatch(one)):
            return [Snapshot(one if name is None else f"{one}:{name}", Path(one), name) for one in matches]
        if os.path.exists(path):
            raise ConfigError(f"{path} is a run directory without checkpoints")
    if "=" in argument and not glob.has_magic(argument) and "/" not in argument:
        raise ConfigError(
            f"{argument.partition('=')[0]}: unknown key, and no file is named {argument}; see --help"
        )
    what = "matches no file or folder" if glob.has_magic(argument) else "does not exist"
    raise ConfigError(f"{argument} {what}; expected checkpoints, nothing is downloaded")


def in_order(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """Return the checkpoints sorted by the steps in their names.

    Raises:
        ConfigError: A name has no step, it is unclear which of its numbers is the step, or two have the same step.
    """
    placed = with_steps(snapshots)
    if any(one.step is None for one in placed):
        names = listed([one.text for one in snapshots], 3)
        raise ConfigError(
            f"the order of the checkpoints is unknown: expected a step in each name, as in step_1000, got {names};"
            " name them in order and give coefficients=[…]"
        )
    placed = sorted(placed, key=lambda one: one.step or 0)
    for earlier, later in pairwise(placed):
        if earlier.step == later.step:
            raise ConfigError(f"{earlier.text} and {later.text} both have step {later.step} in their names")
    return placed


def with_steps(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """Return the checkpoints in their own order, with their steps if all names have one."""
    steps: Sequence[int | None] = _steps(_distinct_names(snapshots)) or [None] * len(snapshots)
    return [replace(one, step=step) for one, step in zip(snapshots, steps, strict=True)]


def _distinct_names(snapshots: Sequence[Snapshot]) -> Sequence[str]:
    """Return the last component of each path in which the paths differ, such as the folder of equal file names."""
    paths = [one.path.absolute().parts[::-1] for one in snapshots]
    for parts in zip(*paths, strict=False):
        if len(snapshots) == 1 or len({*parts}) > 1:
            return parts
    return [one.path.name for one in snapshots]


def _steps(names: Sequence[str]) -> list[int] | None:
    """Return the step in each name: the number after the word step, or the only number in which the names differ."""
    named = [_STEP.findall(name) for name in names]
    if all(len(found) == 1 for found in named):
        return _whole([found[0] for found in named])
    numbers = [_NUMBER.findall(name) for name in names]
    if len({len(found) for found in numbers}) != 1:
        return None
    columns = list(zip(*numbers, strict=True))
    differing = [column for column in columns if len({*column}) > 1] if len(names) > 1 else columns
    return _whole(differing[0]) if len(differing) == 1 else None


def _whole(texts: Sequence[str]) -> list[int] | None:
    return [int(text) for text in texts] if all(len(text) <= _LONGEST for text in texts) else None
