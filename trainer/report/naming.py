"""Which of many runs are seeds of one another, and what to call them: by what differs between their configurations."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from trainer.report.group import Group
from trainer.report.runs import Run

WHERE_AND_HOW = {
    *("run_dir", "sweep_dir", "resume", "seed", "allow_targets"),
    *(f"trainer.{key}" for key in ("log_every", "save_every", "keep_checkpoints", "timeout_s")),
    *(f"trainer.{key}" for key in ("num_workers", "num_threads", "eval_batch_size")),
}
"""Settings that say where a run lies, how often it was made and how it is watched, not what it trains."""
WATCHED_BY = ("logger.", "launch.", "hydra.")
MAX_LABEL = 60
"""Characters up to which a group is called by all in which it differs."""
MAX_VALUE = 20
"""Characters up to which a setting's value is shown whole beside others of it."""
NO_NAMES = ("name", "_target_", "type")
"""Keys that say nothing without the one above."""
PARTS = re.compile(r"(?<=[/,_\-\[ ])|(?<=[A-Za-z]\.)")
"""Where a value may be cut: between folders, words and items; not within a number."""
ABSENT = "(none)"


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Keys of the settings that not all runs share, sorted."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return sorted(
        key
        for key in keys
        if key not in WHERE_AND_HOW
        and not key.startswith(WATCHED_BY)
        and len({run.settings.get(key) for run in runs}) > 1
    )


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ in their seed or in their averages alone become one group; sorted by what tells groups apart.

    A run whose last evaluation is earlier than that of others in its group (it failed, or goes on) is kept: who
    compares last evaluations leaves it out.
    """
    keys = differing_settings(runs)
    training = [key for key in keys if not key.startswith("ema.")]
    found: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        found[tuple(run.settings.get(key, ABSENT) for key in training)].append(run)
    order = sorted(found, key=lambda chosen: [_sortable(text) for text in chosen])
    settings = [dict(zip(training, chosen, strict=True)) for chosen in order]
    kept = _kept(settings, training)
    names = _names(settings, kept, len(training) - len(kept))
    if len(order) == 1:
        names = [runs[0].name if len(runs) == 1 else "all runs"]
    averaging = [key for key in keys if key.startswith("ema.")]
    tellings = _shortened(settings, kept)
    abridged = len(kept) < len(training)
    if abridged and len(order) == len(runs):  # a few settings do not say which run is meant
        tellings = [
            {"run": found[chosen][0].name} | told for chosen, told in zip(order, tellings, strict=True)
        ]
    return [
        Group(name, found[chosen], _labels(found[chosen], averaging), told, name_is_partial=abridged)
        for name, chosen, told in zip(names, order, tellings, strict=True)
    ]


def _sortable(text: str) -> tuple[float, str]:
    try:
        return float(text), ""
    except ValueError:
        return float("inf"), text


def _kept(settings: Sequence[Mapping[str, str]], keys: Sequence[str]) -> list[str]:
    """The settings that name a group: all that differ if that is short, else the fewest that tell all groups apart."""
    whole = max((len(_told(chosen, keys)) for chosen in settings), default=0) <= MAX_LABEL
    return list(keys) if whole else _telling(settings, keys)


def _names(settings: Sequence[Mapping[str, str]], kept: Sequence[str], more: int) -> list[str]:
    return [_told(chosen, kept) + (f" (and {more} more)" if more else "") for chosen in settings]


def _shortened(settings: Sequence[Mapping[str, str]], keys: Sequence[str]) -> list[dict[str, str]]:
    """For each group what tells it apart, as short as it may be: `lr` for `optimizer.lr`, long values by their ends.

    What differs is never cut: of a key the shortest ending that no other has is left, of long values all but what they
    share at their beginning and at their end.
    """
    heads = {key: _ending(key, keys) for key in keys}
    values = {key: _unlike([chosen[key] for chosen in settings]) for key in keys}
    return [{heads[key]: values[key][place] for key in keys} for place in range(len(settings))]


def _ending(key: str, keys: Sequence[str]) -> str:
    parts = key.split(".")
    least = 2 if parts[-1] in NO_NAMES else 1
    endings = (".".join(parts[-count:]) for count in range(least, len(parts)))
    return next((end for end in endings if sum(f".{k}".endswith(f".{end}") for k in keys) == 1), key)


def _unlike(values: Sequence[str]) -> list[str]:
    """Long values without the parts, between separators, that all begin and end with."""
    if max(map(len, values)) <= MAX_VALUE or len(set(values)) == 1:
        return list(values)
    parts = [PARTS.split(value) for value in values]
    most = min(map(len, parts)) - 1
    start = next((n for n in range(most) if len({own[n] for own in parts}) > 1), most)
    end = next((n for n in range(most - start) if len({own[-1 - n] for own in parts}) > 1), most - start)
    return ["…" * (start > 0) + "".join(own[start : len(own) - end]) + "…" * (end > 0) for own in parts]


def _telling(settings: Sequence[Mapping[str, str]], keys: Sequence[str]) -> list[str]:
    """Settings that together tell all groups apart; at each turn the one that tells most, the shortest of equals."""
    kept: list[str] = []
    parts = 1
    while parts < len(settings):
        told = {key: len({tuple(chosen[k] for k in [*kept, key]) for chosen in settings}) for key in keys}
        cost = {key: max(len(f"{key}={chosen[key]}") for chosen in settings) for key in keys}
        # `experiment` names a whole choice of settings.
        best = max(keys, key=lambda key: (told[key], key == "experiment", -cost[key]))
        kept.append(best)
        parts = told[best]
    return sorted(kept)


def _told(chosen: Mapping[str, str], keys: Sequence[str]) -> str:
    return ", ".join(f"{key}={chosen[key]}" for key in keys)


def _labels(runs: Sequence[Run], keys: Sequence[str]) -> dict[tuple[int, str], str]:
    """Other names for averages whose name is given to several configurations of a group."""
    # The names tell the decays, and a bank's other decays are not what an average is.
    telling = [key for key in keys if key not in ("ema.decay", "ema.decays")]
    chosen = [tuple(run.settings.get(key, ABSENT) for key in telling) for run in runs]
    by_name: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for run, values in zip(runs, chosen, strict=True):
        for name in run.averages:
            by_name[name].add(values)
    labels = {}
    for place, (run, values) in enumerate(zip(runs, chosen, strict=True)):
        for name in run.averages:
            if len(by_name[name]) > 1:
                several = [k for n, k in enumerate(telling) if len({v[n] for v in by_name[name]}) > 1]
                told = dict(zip(telling, values, strict=True))
                labels[place, name] = f"{name} ({_told(told, several).replace('ema.', '')})"
    return labels
