"""Tell which runs were evaluated on the same samples. Values on different ones cannot be ranked.

The number of samples is the recorded one: `trainer.eval_samples=0` may mean as many as another number, and a run with
`auto` is compared by its first samples. The samples themselves are those of the settings `data.*`, except for a few
of the data sets here that only change the training. Of a user's own data set every setting counts.
"""

import re
from collections.abc import Iterable, Sequence

from trainer.config.eval_sets import KEY as EVAL_SETS
from trainer.config.eval_sets import TRAINING_ONLY
from trainer.errors import listed
from trainer.report.runs import NO_VALUES, Run

SAMPLES = "trainer.eval_samples"
DATA, OURS = "data.", "trainer.data."
WITH_OWN_SPLIT = {
    "eval_path": ("path", "train_path", "split", "eval_fraction"),
    "eval_split": ("split", "eval_fraction"),
    "eval_fields": ("fields", "eval_fraction"),
}
"""Keys of `data` that name an evaluation split of its own, and those that then do not change it."""
UNSET = {*NO_VALUES, "{}", "[]"}
OTHER_SPELLING = re.compile(r"""(?<![^\["', ])(\./+)+|(?<=.)/+(?=["', \]]|$)""")
"""What may begin or end a path, alone or in a list, without changing it."""
MAX_PARTS = 3
"""Most sets of runs whose samples a note names."""


def by_samples(runs: Sequence[Run], metric: str) -> list[tuple[list[Run], list[str]]]:
    """Divide runs by the samples on which they were evaluated by a metric.

    Returns:
        Pairs of runs and notes: which other runs they cannot be ranked with; none if all have the same samples. Runs
        without an evaluation are in the first pair.
    """
    parts: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        if metric in run.metrics:
            parts.setdefault(tuple(sorted(_samples(run, metric).items())), []).append(run)
    if len(parts) < 2:
        return [(list(runs), [])]
    every = {item for key in parts for item in key}
    differing = {name for name, value in every if any((name, value) not in key for key in parts)}
    texts = [_text(own[0], key, differing) for key, own in parts.items()]
    lacking = [run for run in runs if metric not in run.metrics]
    divided = []
    for place, own in enumerate(parts.values()):
        others = listed(texts[:place] + texts[place + 1 :], MAX_PARTS)
        note = f"Not ranked with runs whose evaluation samples differ: here {texts[place]}; there {others}."
        divided.append((own + (lacking if not place else []), [note]))
    return divided


def _samples(run: Run, metric: str) -> dict[str, str]:
    """Return what decides the samples of the evaluations by a metric: their number, and settings by key."""
    name, slash, _ = metric.partition("/")
    own_set = f"{EVAL_SETS}.{name}."
    changes = {
        DATA + key.removeprefix(own_set): key for key in run.settings if slash and key.startswith(own_set)
    }
    changed = {"eval_sets", *(key.removeprefix(DATA).partition(".")[0] for key in changes)}
    keys = {key: key for key in run.settings if key.startswith(DATA) and not _is_of(key, changed)} | changes
    values = {own: text for own, key in keys.items() if (text := run.settings[key]) not in UNSET}
    uncounted: set[str] = set()
    if values.get(f"{DATA}_target_", OURS).startswith(OURS):
        values = {own: OTHER_SPELLING.sub("", text) for own, text in values.items()}
        named = (
            skipped for key, skipped in WITH_OWN_SPLIT.items() if any(_is_of(own, [key]) for own in values)
        )
        uncounted = {*TRAINING_ONLY}.union(*named)
    counted = {keys[own]: text for own, text in values.items() if not _is_of(own, uncounted)}
    return counted | {SAMPLES: f"{run.eval_samples(metric):.0f}"}


def _is_of(name: str, keys: Iterable[str]) -> bool:
    """Return whether a setting is one of these keys of `data`, or a part of one."""
    return any(name == DATA + key or name.startswith(f"{DATA}{key}.") for key in keys)


def _text(run: Run, key: tuple[tuple[str, str], ...], differing: set[str]) -> str:
    """Name the samples of a run by what differs between runs."""
    own = dict(key)
    shown = [f"{name}={own.get(name, 'null')}" for name in sorted(differing - {SAMPLES})]
    if SAMPLES in differing:
        shown.append(f"{own[SAMPLES]} samples ({SAMPLES}={run.settings.get(SAMPLES, 'not recorded')})")
    return ", ".join(shown)
