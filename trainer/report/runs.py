"""Read a run directory without torch: `metrics.jsonl`, `pairs.jsonl`, `config.yaml`, `overrides.yaml`, `meta.json`."""

import json
import math
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.config.eval_sets import held_out_share
from trainer.errors import ConfigError, listed
from trainer.rundir.columns import EMPTY, Series, read_columns
from trainer.rundir.directory import METRICS
from trainer.rundir.files import parse_yaml, read_json, read_yaml
from trainer.rundir.keys import AVERAGE, EVALUATION, LIVE, average_of, evaluation_key, metric_of
from trainer.rundir.pairs import PAIRS, Pairs, read_last_pairs

SERIAL_BYTES = 64_000_000
"""Total size up to which one process reads all runs; it takes a second or two."""
OPTIONAL = {"ema.averages", "data.eval_sets", "init.rename"}
"""Settings for which null and an empty value mean the same: none."""
EXACT = 2**53
"""Largest absolute value below which every whole number is exact as a float."""
NO_VALUES = ("", "~", "null", "None")
"""Texts of a setting that has no value."""
MOST_DIGITS = 19
"""Most digits of a whole number that a configuration takes; a record may have anything."""
MAX_WORKERS = 8
"""Most reading processes; with more, the disk is the limit."""


@dataclass(frozen=True)
class Split:
    """The evaluation split of a run."""

    samples: int
    by_share: bool
    """Whether `data.eval_fraction` decides its size."""


@dataclass(frozen=True)
class Run:
    """A run directory's records and facts."""

    path: Path
    name: str
    """Name of the directory, or the part of its path that distinguishes it from other runs of that name."""
    columns: dict[str, Series]
    """Logged values by key, in the order in which the keys were first logged."""
    meta: dict[str, Any]
    """`meta.json`; empty if the run has none."""
    pairs: Pairs | None = None
    """What paired comparisons at the last evaluation need; None for a run of an earlier version."""

    @cached_property
    def overrides(self) -> list[str]:
        """Overrides `key=value` of the command line."""
        content = _read_if_there(self.path / "overrides.yaml", read_yaml)
        return [str(item) for item in content] if isinstance(content, list) else []

    @cached_property
    def sessions(self) -> list[tuple[list[str], str]]:
        """(overrides, configuration as YAML) of each session that resumed the run."""
        resumed = self.meta.get("resumed")
        sessions = []
        for entry in resumed if isinstance(resumed, list) else []:
            if isinstance(entry, dict):
                overrides = entry.get("overrides")
                texts = [str(item) for item in overrides] if isinstance(overrides, list) else []
                sessions.append((texts, str(entry.get("config", ""))))
        return sessions

    @cached_property
    def config(self) -> dict[str, Any]:
        """Configuration as nested dictionaries; if the run was resumed, that of its last session."""
        if self.sessions:
            try:
                content = parse_yaml(self.sessions[-1][1])
            except ValueError as error:
                raise ConfigError(f"{self.path / 'meta.json'}: expected YAML ({error})") from error
        else:
            content = _read_if_there(self.path / "config.yaml", read_yaml)
        return content if isinstance(content, dict) else {}

    @cached_property
    def settings(self) -> dict[str, str]:
        """Leaves of the configuration as `key.key: value`; the overrides if the run has no configuration."""
        if self.config:
            try:
                return dict(_leaves(self.config, ""))
            except ValueError as error:  # a whole number with thousands of digits, as hexadecimal ones may be
                raise ConfigError(
                    f"{self.path}: expected smaller numbers in the configuration ({error})"
                ) from error
        overrides = (override.partition("=") for override in self.overrides)
        return {key.lstrip("+~"): value for key, _, value in overrides}

    @property
    def fork(self) -> str | None:
        """The checkpoint that the run was forked from; None for a run from the start."""
        return self.value_of("fork")

    def value_of(self, key: str) -> str | None:
        """Return a setting; None if it has no value, or if the run does not have it."""
        text = self.settings.get(key, "")
        return None if text in NO_VALUES else text

    def series(self, key: str) -> Series:
        """Return all values logged under `key`."""
        return self.columns.get(key, EMPTY)

    def evaluation(self, weights: str, metric: str) -> Series:
        """Return the values of `metric` for the live weights (`live`) or for the average named `weights`."""
        return self.series(evaluation_key(weights, metric))

    def update_every(self, name: str) -> int:
        """Return the optimizer steps between two updates of an average; its logged decay is per update."""
        own, common = (f"ema.averages.{name}.update_every", "ema.update_every")
        text = self.settings.get(own, self.settings.get(common, ""))
        return whole_number(text) or 1

    @cached_property
    def averages(self) -> list[str]:
        """Names of the averages that were evaluated or tracked, in the order in which they were logged."""
        return list(dict.fromkeys(filter(None, map(average_of, self.columns))))

    @cached_property
    def metrics(self) -> list[str]:
        """Names of the evaluated metrics, the primary one first."""
        live = (key for key in self.columns if key.startswith(evaluation_key(LIVE, "")))
        names = [metric for key in live if (metric := metric_of(key)) is not None]
        return sorted(names, key=lambda name: name != self.primary_metric)

    @property
    def unfinished(self) -> str | None:
        """Its name and the step of its last evaluation, if that is before the last step of the run; else None."""
        evaluated = max((int(self.evaluation(LIVE, name).steps[-1]) for name in self.metrics), default=0)
        steps = whole_number(self.settings.get("trainer.steps", ""))
        if steps is None or evaluated >= steps:
            return None
        return f"{self.name} (evaluated at step {evaluated} of {steps})"

    @property
    def primary_metric(self) -> str:
        """Metric that decides the winner: the one that the task declared in `meta.json`, else the loss."""
        return str(self.meta.get("primary_metric", "loss"))

    def eval_samples(self, metric: str) -> float:
        """Return the samples of an evaluation by `metric`; infinite if it used a whole split of unrecorded size."""
        name, slash, _ = metric.partition("/")
        sets = self.meta.get("eval_sets")
        sizes = sets if slash and isinstance(sets, dict) else {}
        recorded = sizes.get(name, self.meta.get("num_samples"))
        if isinstance(recorded, int):
            return recorded
        return whole_number(self.settings.get("trainer.eval_samples", "")) or math.inf

    def split(self, metric: str) -> Split | None:
        """Return the samples that an evaluation by `metric` could take; None if that is not recorded."""
        size, data = self.meta.get("split_samples"), self.config.get("data")
        if not isinstance(size, int) or "/" in metric:
            return None
        return Split(size, isinstance(data, dict) and held_out_share(data) is not None)

    def with_unit(self, metric: str) -> str:
        """Return `metric` followed by its unit, if `metric_units` in `meta.json` gives one."""
        units = self.meta.get("metric_units")
        unit = units.get(metric) if isinstance(units, dict) else None
        return f"{metric} ({unit})" if unit else metric

    def higher_is_better(self, metric: str) -> bool | None:
        """Return whether higher values of a metric are better, from the lists in `meta.json`.

        None if `meta.json` has no such list (except for the loss), if the metric has no declared direction, or if its
        estimate is biased. Such a metric gets no verdict.
        """
        higher, undeclared = self.meta.get("higher_is_better"), self.meta.get("direction_undeclared")
        if isinstance(undeclared, list) and metric in undeclared:
            return None
        if isinstance(higher, list):
            return metric in higher
        return False if metric == "loss" else None


def whole_number(text: str) -> int | None:
    """Return the whole number of at least 0 that a setting is; None for any other text."""
    return int(text) if text.isdecimal() and len(text) <= MOST_DIGITS else None


def read_run(path: Path, wanted: Callable[[str], bool] | None = None) -> Run:
    """Read a run directory.

    Args:
        path: The directory.
        wanted: Returns whether the values of a key are kept; None keeps all.

    Raises:
        ConfigError: `path` is not a run directory, or a file in it is damaged. A truncated last line of metrics is
            ignored.
    """
    if not (path / METRICS).is_file():
        raise ConfigError(f"{path}: expected a run directory (one with a metrics.jsonl)")
    columns = read_columns(path / METRICS, wanted or (lambda key: True))
    pairs = read_last_pairs(path / PAIRS)
    meta = _read_if_there(path / "meta.json", read_json)
    return Run(path, path.resolve().name, columns, meta if isinstance(meta, dict) else {}, pairs)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read the keys that comparisons need (`is_compared`) from many run directories, in parallel if they are large.

    If two directories have the same name, all runs are named by their paths below the common parent.

    Raises:
        ConfigError: A path is not a run directory, or a file in it is damaged.
    """
    size = sum(path.stat().st_size for path in (folder / METRICS for folder in paths) if path.is_file())
    workers = min(len(paths), len(os.sched_getaffinity(0)), MAX_WORKERS) if size > SERIAL_BYTES else 1
    if workers > 1:
        # Fork is safe here because this process has no other thread yet; a fresh interpreter would import all again.
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
            runs = list(pool.map(_read_compared, paths, chunksize=4))
    else:
        runs = [_read_compared(path) for path in paths]
    names = Counter(run.name for run in runs)
    if max(names.values(), default=0) > 1:
        common = os.path.commonpath([run.path.resolve() for run in runs])
        runs = [replace(run, name=os.path.relpath(run.path.resolve(), common)) for run in runs]
    return runs


def _read_compared(path: Path) -> Run:
    run = read_run(path, is_compared)
    _ = run.settings  # cached here so that the worker process parses the YAML
    return run


def is_compared(key: str) -> bool:
    """Return whether comparisons use this key: evaluations, and values of whole averages (not of blocks)."""
    if key.startswith(AVERAGE):
        return "/block/" not in key and key.endswith(("/decay", "/rel_l2", "/slope"))
    return key.startswith(EVALUATION)


def unfinished_note(runs: Sequence[Run]) -> list[str]:
    """Return a note that names the runs which have not done all their steps; [] if all have."""
    names = [name for run in runs if (name := run.unfinished) is not None]
    return [f"Unfinished: {listed(names)}."] if names else []


def find_runs(path: Path) -> list[Path]:
    """Return `[path]` if it is a run directory, else all run directories below it, sorted.

    Raises:
        ConfigError: `path` does not exist or contains no run directory.
    """
    if (path / METRICS).is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"{path}: no such run or sweep directory")
    paths = sorted(_run_directories(path))
    if not paths:
        raise ConfigError(
            f"{path}: expected a run directory, or a directory of runs (no metrics.jsonl below it)"
        )
    return paths


def _run_directories(folder: Path) -> Iterable[Path]:
    # A run directory has thousands of files (checkpoints, wandb) and contains no other run: do not search inside it.
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            if (child / METRICS).is_file():
                yield child
            else:
                yield from _run_directories(child)


def _leaves(node: dict[Any, Any], prefix: str) -> Iterable[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _text_of(f"{prefix}{key}", value)


def _text_of(key: str, value: Any) -> str:
    """Return a value as text: one text for 1 and 1.0, and for null and an empty value of the keys in OPTIONAL."""
    value = _plain(None if key in OPTIONAL and not value else value)
    return json.dumps(value, default=str) if isinstance(value, list) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < EXACT else value


def _read_if_there(path: Path, read: Callable[[Path], Any]) -> Any:
    """Return the content of a file, None if it is missing."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
