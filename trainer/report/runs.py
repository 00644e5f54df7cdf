"""What a run directory says, read without torch: `metrics.jsonl`, `config.yaml`, `overrides.yaml`, `meta.json`."""

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

from trainer.errors import ConfigError
from trainer.rundir.records import EMPTY, Series, read_columns

METRICS = "metrics.jsonl"
LIVE = "live"
"""Name of the live weights wherever averages are told apart by name."""

SERIAL_BYTES = 64_000_000
"""Up to here one process reads everything, in a second or two."""
MAX_WORKERS = 8
"""Processes that read: more of them wait for the disk."""


@dataclass(frozen=True)
class Run:
    """A run directory's records and facts."""

    path: Path
    name: str
    """The directory's own name, or as much of its path as tells it from others."""
    columns: dict[str, Series]
    """By key, in the order in which the keys were first logged."""
    meta: dict[str, Any]
    """`meta.json`; empty if the run has none."""

    @cached_property
    def overrides(self) -> list[str]:
        """`key=value` as typed on the command line."""
        path = self.path / "overrides.yaml"
        content = _parse_yaml(path.read_bytes(), path) if path.is_file() else None
        return [str(item) for item in content] if isinstance(content, list) else []

    @cached_property
    def sessions(self) -> list[tuple[list[str], str]]:
        """(what was typed, configuration as YAML) of each session that carried the run on."""
        found = self.meta.get("resumed")
        found = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
        typed = [entry.get("overrides") for entry in found]
        texts = [str(entry.get("config", "")) for entry in found]
        return [
            ([str(item) for item in items] if isinstance(items, list) else [], text)
            for items, text in zip(typed, texts, strict=True)
        ]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration as nested dictionaries: that of the last session, if the run was carried on."""
        path = self.path / "config.yaml"
        if self.sessions:
            content = _parse_yaml(self.sessions[-1][1], self.path / "meta.json")
        else:
            content = _parse_yaml(path.read_bytes(), path) if path.is_file() else None
        return content if isinstance(content, dict) else {}

    @cached_property
    def settings(self) -> dict[str, str]:
        """The configuration's leaves as `key.key: value`; of a run without one, what was typed."""
        if self.config:
            return dict(_leaves(self.config, ""))
        typed = (override.partition("=") for override in self.overrides)
        return {key.lstrip("+~"): value for key, _, value in typed}

    def series(self, key: str) -> Series:
        """All values logged under `key`."""
        return self.columns.get(key, EMPTY)

    def evaluation(self, weights: str, metric: str) -> Series:
        """Values of `metric` for the live weights (`live`) or for the average of that name."""
        return self.series(f"eval/{LIVE}/{metric}" if weights == LIVE else f"eval/ema/{weights}/{metric}")

    def gap(self, name: str, metric: str) -> tuple[Series, Series]:
        """Live minus average on the same samples, and its standard error."""
        return self.series(f"eval/gap/{name}/{metric}"), self.series(f"eval/gap/{name}/{metric}_se")

    def update_every(self, name: str) -> int:
        """Optimizer steps that an update of an average, and the decay that is logged of it, stand for."""
        own, common = (f"ema.averages.{name}.update_every", "ema.update_every")
        text = self.settings.get(own, self.settings.get(common, ""))
        return int(text) if text.isdecimal() and int(text) > 0 else 1

    @cached_property
    def averages(self) -> list[str]:
        """Names of the averages that were evaluated or tracked, in the order in which they were logged."""
        found: dict[str, None] = {}
        for key in self.columns:
            if key.startswith("eval/ema/"):
                found[key.removeprefix("eval/ema/").rpartition("/")[0]] = None
            elif key.startswith("ema/") and key.endswith("/rel_l2") and "/block/" not in key:
                found[key.removeprefix("ema/").removesuffix("/rel_l2")] = None
        return list(found)

    @cached_property
    def metrics(self) -> list[str]:
        """Names of the evaluated metrics, the primary one first."""
        prefix = f"eval/{LIVE}/"
        names = [key.removeprefix(prefix) for key in self.columns if key.startswith(prefix)]
        return sorted(names, key=lambda name: name != self.primary_metric)

    @property
    def primary_metric(self) -> str:
        """The metric that decides who won: what the task said in `meta.json`, else the loss."""
        return str(self.meta.get("primary_metric", "loss"))

    @property
    def eval_samples(self) -> float:
        """Samples of an evaluation, infinite if it was the whole split and nobody said how large that is."""
        known = self.meta.get("num_samples")
        if isinstance(known, int):
            return known
        text = self.settings.get("trainer.eval_samples", "")
        return float(text) if text.isdecimal() and int(text) > 0 else math.inf

    def with_unit(self, metric: str) -> str:
        """`metric` with its unit, where `meta.json` gives one in `metric_units`."""
        units = self.meta.get("metric_units")
        unit = units.get(metric) if isinstance(units, dict) else None
        return f"{metric} ({unit})" if unit else metric

    def higher_is_better(self, metric: str) -> bool | None:
        """Direction of a metric: `meta.json` lists those of which more is better. None if it lists nothing.

        None, too, of metrics without a verdict: those whose direction nobody declared, and biased ones.
        """
        rising, unknown = self.meta.get("higher_is_better"), self.meta.get("direction_undeclared")
        if isinstance(unknown, list) and metric in unknown:
            return None
        if isinstance(rising, list):
            return metric in rising
        return False if metric == "loss" else None


def read_run(path: Path, wanted: Callable[[str], bool] | None = None) -> Run:
    """Read a run directory.

    Args:
        path: The directory.
        wanted: Says of which keys the values are kept; all if None.

    Raises:
        ConfigError: not a run directory, or a file in it that is damaged (a torn last line of metrics is not).
    """
    if not (path / METRICS).is_file():
        raise ConfigError(f"{path}: expected a run directory (one with a metrics.jsonl)")
    columns = read_columns(path / "metrics.jsonl", wanted or (lambda key: True))
    return Run(path, path.resolve().name, columns, _read_meta(path / "meta.json"))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read what comparisons look at (`is_compared`) in many run directories, in several processes if that pays.

    Runs of the same directory name are told apart by as much of their paths as differs.

    Raises:
        ConfigError: as `read_run`.
    """
    size = sum(path.stat().st_size for path in (folder / METRICS for folder in paths) if path.is_file())
    workers = min(len(paths), len(os.sched_getaffinity(0)), MAX_WORKERS) if size > SERIAL_BYTES else 1
    if workers > 1:
        # Forked, with no thread yet in this process: a fresh interpreter would import all again.
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
    _ = run.settings  # read here, in the process that reads for others
    return run


def is_compared(key: str) -> bool:
    """Whether a comparison of runs looks at this key: evaluations, and each average as a whole."""
    if key.startswith("ema/"):
        return "/block/" not in key and key.endswith(("/decay", "/rel_l2", "/slope"))
    return key.startswith("eval/")


def find_runs(path: Path) -> list[Path]:
    """`path` itself if it is a run directory, else every run directory beneath it, sorted.

    Raises:
        ConfigError: there is none.
    """
    if (path / METRICS).is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"{path}: no such run or sweep directory")
    found = sorted(_run_directories(path))
    if not found:
        raise ConfigError(
            f"{path}: expected a run directory, or a directory of runs (no metrics.jsonl beneath it)"
        )
    return found


def _run_directories(folder: Path) -> Iterable[Path]:
    # A run has thousands of files (checkpoints, wandb) and no run inside it: stop at the first level that is one.
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
            yield f"{prefix}{key}", json.dumps(value, default=str) if isinstance(value, list) else str(value)


def _read_meta(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path}: expected JSON ({error})") from error
    return content if isinstance(content, dict) else {}


def _parse_yaml(text: bytes | str, path: Path) -> Any:
    """Plain data from YAML. The C parser is ten times faster: sweeps have many runs."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: expected YAML ({str(error).splitlines()[0]})") from error
