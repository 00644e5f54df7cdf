"""Group runs by their configurations, and name each group by the settings in which the groups differ."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from trainer.report.group import Group
from trainer.report.runs import Run

IGNORED_KEYS = {
    *("run_dir", "sweep_dir", "resume", "seed", "allow_targets"),
    *("trainer.log_every", "trainer.sample_grids", "trainer.save_every", "trainer.async_save"),
    *("trainer.keep_checkpoints", "trainer.on_checkpoint", "trainer.timeout_s", "trainer.num_workers"),
    *("trainer.num_threads", "trainer.eval_batch_size"),
}
"""Settings that do not change what a run trains: paths, the seed, logging, saving and speed."""
IGNORED_PREFIXES = ("logger.", "launch.", "hydra.")
MAX_NAME = 60
"""Most characters of a group name that lists every differing setting."""
MAX_VALUE = 20
"""Most characters of a value that is shown whole beside other values of the same setting."""
AMBIGUOUS_KEYS = ("name", "_target_", "type")
"""Keys that are clear only together with the key above them."""
CUT_POINTS = re.compile(r"(?<=[/,_\-\[ ])|(?<=[A-Za-z]\.)")
"""Where a value may be cut: between folders, words and items, never within a number."""
ABSENT = "(none)"
"""Text for null, and for the value of a setting that a run does not have."""


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Return the sorted keys of the settings whose values differ between runs."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return sorted(
        key
        for key in keys
        if key not in IGNORED_KEYS
        and not key.startswith(IGNORED_PREFIXES)
        and len({run.value_of(key) for run in runs}) > 1
    )


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs that differ only in their seed or in their averages; sort the groups by their settings.

    A run that failed or still trains stays in its group, although its last evaluation is earlier than that of the
    others. Code that compares last evaluations must leave it out.
    """
    keys = differing_settings(runs)
    training_keys = [key for key in keys if not key.startswith("ema.")]
    members: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        members[tuple(run.value_of(key) or ABSENT for key in training_keys)].append(run)
    order = sorted(members, key=lambda values: [_sort_key(text) for text in values])
    settings = [dict(zip(training_keys, values, strict=True)) for values in order]
    naming_keys = _naming_keys(settings, training_keys)
    omitted = len(training_keys) - len(naming_keys)
    end = f" (and {omitted} more)" if omitted else ""
    names = [_join(values, naming_keys) + end for values in settings]
    if len(order) == 1:
        names = [runs[0].name if len(runs) == 1 else "all runs"]
    ema_keys = [key for key in keys if key.startswith("ema.")]
    short = _short_settings(settings, naming_keys)
    groups = [members[values] for values in order]
    if omitted and len(order) == len(runs):  # a few settings do not identify a single run
        short = [{"run": own[0].name} | shown for own, shown in zip(groups, short, strict=True)]
    return [
        Group(name, own, _average_names(own, ema_keys), shown, name_is_partial=omitted > 0)
        for name, own, shown in zip(names, groups, short, strict=True)
    ]


def _sort_key(text: str) -> tuple[float, str]:
    """Sort numbers by value, before all other texts."""
    try:
        return float(text), ""
    except ValueError:
        return float("inf"), text


def _naming_keys(settings: Sequence[Mapping[str, str]], keys: Sequence[str]) -> list[str]:
    """Return all differing keys if the names stay short, else the fewest that distinguish all groups."""
    longest = max((len(_join(values, keys)) for values in settings), default=0)
    return list(keys) if longest <= MAX_NAME else _distinguishing_keys(settings, keys)


def _short_settings(settings: Sequence[Mapping[str, str]], keys: Sequence[str]) -> list[dict[str, str]]:
    """Return each group's settings with short keys (`lr` for `optimizer.lr`) and shortened long values.

    The differing part is never cut: a key keeps its shortest unique ending, and a long value loses only the beginning
    and the end that all groups share.
    """
    short_keys = {key: _unique_ending(key, keys) for key in keys}
    values = {key: _without_common_ends([own[key] for own in settings]) for key in keys}
    return [{short_keys[key]: values[key][index] for key in keys} for index in range(len(settings))]


def _unique_ending(key: str, keys: Sequence[str]) -> str:
    parts = key.split(".")
    least = 2 if parts[-1] in AMBIGUOUS_KEYS else 1
    endings = (".".join(parts[-count:]) for count in range(least, len(parts)))
    return next((end for end in endings if sum(f".{k}".endswith(f".{end}") for k in keys) == 1), key)


def _without_common_ends(values: Sequence[str]) -> list[str]:
    """Cut the parts that all long values begin or end with."""
    if max(map(len, values)) <= MAX_VALUE or len(set(values)) == 1:
        return list(values)
    parts = [CUT_POINTS.split(value) for value in values]
    most = min(map(len, parts)) - 1
    start = next((n for n in range(most) if len({own[n] for own in parts}) > 1), most)
    end = next((n for n in range(most - start) if len({own[-1 - n] for own in parts}) > 1), most - start)
    return ["…" * (start > 0) + "".join(own[start : len(own) - end]) + "…" * (end > 0) for own in parts]


def _distinguishing_keys(settings: Sequence[Mapping[str, str]], keys: Sequence[str]) -> list[str]:
    """Choose keys greedily until they distinguish all groups: first the key that separates most, then the shortest."""
    chosen: list[str] = []
    separated = 1
    while separated < len(settings):
        counts = {key: len({tuple(own[k] for k in [*chosen, key]) for own in settings}) for key in keys}
        lengths = {key: max(len(f"{key}={own[key]}") for own in settings) for key in keys}
        # Prefer `experiment`, which names a whole choice of settings.
        best = max(keys, key=lambda key: (counts[key], key == "experiment", -lengths[key]))
        chosen.append(best)
        separated = counts[best]
    return sorted(chosen)


def _join(values: Mapping[str, str], keys: Sequence[str]) -> str:
    return ", ".join(f"{key}={values[key]}" for key in keys)


def _average_names(runs: Sequence[Run], keys: Sequence[str]) -> dict[tuple[int, str], str]:
    """Return new names, by (index of the run, name), for averages of one name and several configurations."""
    # An average's name already contains its decay, and the others of a bank do not change the average.
    bank = ("ema.decay", "ema.decays", "ema.axis", "ema.axis_grows", "ema.averages")
    common = [key for key in keys if key not in bank and not key.startswith("ema.averages.")]
    members: dict[str, list[int]] = defaultdict(list)
    for index, run in enumerate(runs):
        for name in run.averages:
            members[name].append(index)
    names = {}
    for name, indices in members.items():
        own = [key for key in keys if key.startswith(f"ema.averages.{name}.")]
        settings = [{key: runs[index].value_of(key) or ABSENT for key in common + own} for index in indices]
        several = [key for key in common + own if len({values[key] for values in settings}) > 1]
        for index, values in zip(indices, settings, strict=True):
            if several:
                names[index, name] = f"{name} ({_join(values, several).replace('ema.', '')})"
    return names
