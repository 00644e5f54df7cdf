"""Read `data.eval_sets`: further evaluation sets, each by the changes to the group `data`. Imports no torch.

    data:
      eval_sets:
        shifted: {eval_path: other}   # logged as eval/live/shifted/loss, eval/ema/<name>/shifted/loss, ...

The evaluation split of `data` itself is the primary set: it decides verdicts and which weights are best.
"""

from collections.abc import Mapping
from typing import Any

from trainer.config.averages import AVERAGE_NAME
from trainer.errors import ConfigError

KEY = "data.eval_sets"
TRAINING_ONLY = ("labelled", "label_noise", "seed", "transforms", "num_classes", "vocab_size", "token_bytes")
"""Keys of the data sets here that do not change which samples are evaluated."""


def primary_set(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the group `data` without the further sets."""
    return {key: value for key, value in data.items() if key != "eval_sets"}


def further_sets(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the node of each further evaluation set by its name.

    A set is the group `data` with some keys replaced. With a `_target_` it is a whole group of its own.

    Raises:
        ConfigError: It is no mapping of names to such changes; names the key.
    """
    sets = data.get("eval_sets") or {}
    if not isinstance(sets, Mapping):
        raise ConfigError(
            f"{KEY}: expected names with keys of data, as in {{other: {{path: DIR}}}}, got {sets!r}"
        )
    nodes = {}
    for name, changes in sets.items():
        if not AVERAGE_NAME.fullmatch(str(name)):
            raise ConfigError(
                f"{KEY}: expected names of letters, digits, _, ., + and - (and not 'live'), got {name!r}"
            )
        if not isinstance(changes, Mapping) or not changes or "eval_sets" in changes:
            raise ConfigError(
                f"{KEY}.{name}: expected keys of data that differ, as in {{path: DIR}}, got {changes!r}"
            )
        nodes[str(name)] = dict(changes) if "_target_" in changes else {**primary_set(data), **changes}
    return nodes


def may_be_trained_on(data: Mapping[str, Any]) -> list[str]:
    """Return a warning for each further set that keeps a share of the same data and may have training samples.

    The shares are nested, so one above the share of `data` has samples that the run is trained on; and if another key
    of `data` names what is evaluated, the run is trained on all of them.
    """
    share, named = held_out_share(data), _naming_a_split(data)
    warnings = []
    for name, node in further_sets(data).items():
        own = held_out_share(node)
        if own is None or _source(node) != _source(data):
            continue
        if named:
            warnings.append(
                f"{KEY}.{name}: its share of the data has samples that the run is trained on, because"
                f" data.{named[0]} is set"
            )
        elif share is not None and own > share:
            warnings.append(
                f"{KEY}.{name}.eval_fraction: above data.eval_fraction={share}, so this set may have samples that the"
                " run is trained on"
            )
    return warnings


def held_out_share(data: Mapping[str, Any]) -> float | None:
    """Return `data.eval_fraction`; None if it decides nothing, because another key names what is evaluated."""
    share: float | None = data.get("eval_fraction")
    return None if _naming_a_split(data) else share


def _naming_a_split(data: Mapping[str, Any]) -> list[str]:
    """Return the keys that name what is evaluated, such as `eval_path`."""
    others = ("eval_fraction", "eval_sets")
    return [
        key
        for key, value in data.items()
        if key.startswith("eval_") and key not in others and value is not None
    ]


def _source(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that decide which samples there are, in both splits together."""
    return {
        key: value
        for key, value in data.items()
        if not key.startswith("eval_") and key not in TRAINING_ONLY and value is not None
    }


def part_of_the_data(count: int, split: int, data: Mapping[str, Any]) -> str:
    """Return which part of the data is `count` of the `split` samples for evaluation, and the keys that change it."""
    share = held_out_share(data)
    whole = f"the evaluation split (data.eval_fraction={share})" if share else "the evaluation split"
    if count == split:
        return f"all {count} samples of {whole}"
    return f"{count} of {split} samples of {whole}; trainer.eval_samples=0 takes all"
