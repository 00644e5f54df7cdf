"""What a run directory says, read without torch: `metrics.jsonl`, `config.yaml`, `overrides.yaml`, `meta.json`."""

import json
import math
import multiprocessing
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.config import ConfigError

METRICS = "metrics.jsonl"
STEP = "train/step"
LIVE = "live"
"""Name of the live weights wherever averages are told apart by name."""

SERIAL_BYTES = 64_000_000
"""Up to here one process reads everything, in a second or two."""
MAX_WORKERS = 8
"""Processes that read: more of them wait for the disk."""
MAX_SHAPES = 8
"""Sets of keys whose lines are read fast: with and without an evaluation, before and after an average started."""


class Series(NamedTuple):
    """What was logged under one key."""

    steps: NDArray[np.int64]
    """Rising."""
    values: NDArray[np.float64]
    """NaN where a value was not finite."""

    def finite(self) -> "Series":
        """Without what was not finite."""
        kept = np.isfinite(self.values)
        return Series(self.steps[kept], self.values[kept])


EMPTY = Series(np.empty(0, np.int64), np.empty(0))


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
    def config(self) -> dict[str, Any]:
        """The configuration as nested dictionaries: that of the last session, if the run was carried on."""
        path = self.path / "config.yaml"
        sessions = self.meta.get("resumed")
        if isinstance(sessions, list) and sessions and isinstance(sessions[-1], dict):
            content = _parse_yaml(str(sessions[-1].get("config", "")), self.path / "meta.json")
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
        """Samples of an evaluation, infinite if it was the whole split or nobody said."""
        text = self.settings.get("trainer.eval_samples", "")
        return float(text) if text.isdigit() and int(text) > 0 else math.inf

    def named(self, metric: str) -> str:
        """`metric` with its unit, where `meta.json` gives one in `metric_units`."""
        units = self.meta.get("metric_units")
        unit = units.get(metric) if isinstance(units, dict) else None
        return f"{metric} ({unit})" if unit else metric

    def higher_is_better(self, metric: str) -> bool | None:
        """Direction of a metric: `meta.json` lists those of which more is better. None if it lists nothing."""
        rising = self.meta.get("higher_is_better")
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
    columns = _read_columns(path / "metrics.jsonl", wanted or (lambda key: True))
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
    return read_run(path, is_compared)


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


class _Block(NamedTuple):
    """Records with the same keys."""

    keys: list[str]
    lines: NDArray[np.int64]
    """Where they stand in the file: the later record of a step wins."""
    steps: NDArray[np.int64]
    columns: list[NDArray[np.float64]]
    """By key."""


def _read_columns(path: Path, wanted: Callable[[str], bool]) -> dict[str, Series]:
    lines = path.read_bytes().splitlines()
    blocks: list[_Block] = []
    left = list(range(len(lines)))
    for _ in range(MAX_SHAPES):
        if left and (shape := _shape(lines[left[0]], wanted)) is not None:
            alike, left = _alike(lines, left, *shape)
            blocks += alike
    blocks += _one_by_one(lines, left, wanted, path)
    parts: dict[str, list[tuple[_Block, int]]] = {}
    for block in sorted(blocks, key=lambda block: block.lines[0]):
        for row, key in enumerate(block.keys):
            parts.setdefault(key, []).append((block, row))
    return {key: _joined(found) for key, found in parts.items()}


def _shape(line: bytes, wanted: Callable[[str], bool]) -> tuple[list[str], re.Pattern[bytes]] | None:
    """The keys of a record and a pattern of lines that differ from it in their numbers alone; None if it has others.

    Such lines are most of a file. Taking their numbers out, without making a dictionary of each and without looking at
    keys that nobody wants, is twice as fast as the JSON parser.
    """
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not _is_record(record):
        return None
    kept = [key for key in record if key != STEP and wanted(key)]
    number = rb"[-+.0-9eEnul]+"
    parts = [
        re.escape(json.dumps(key).encode())
        + b": "
        + (b"(" + number + b")" if key == STEP or key in kept else number)
        for key in record
    ]
    first = list(record).index(STEP) == 0
    return (kept, re.compile(rb"\{" + b", ".join(parts) + rb"\}")) if first else None


def _alike(
    lines: Sequence[bytes], places: Sequence[int], keys: list[str], pattern: re.Pattern[bytes]
) -> tuple[list[_Block], list[int]]:
    """The block of the lines that match, and the places of those that do not."""
    matches = [pattern.fullmatch(lines[place]) for place in places]
    found = [place for place, match in zip(places, matches, strict=True) if match]
    numbers = b",".join(b",".join(match.groups()) for match in matches if match).replace(b"null", b"nan")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            table = np.fromstring(numbers, sep=",").reshape(len(found), 1 + len(keys))
    except (ValueError, DeprecationWarning):
        table = np.empty((0, 1))
    if not len(table) or not np.isfinite(table[:, 0]).all():
        return [], list(places)  # something only looked like a number: told with its line
    columns = [np.where(np.isinf(column), np.nan, column) for column in table[:, 1:].T]
    block = _Block(keys, np.array(found), table[:, 0].astype(np.int64), columns)
    return [block], [place for place, match in zip(places, matches, strict=True) if not match]


def _one_by_one(
    lines: Sequence[bytes], places: Sequence[int], wanted: Callable[[str], bool], path: Path
) -> list[_Block]:
    """Blocks of any other lines, and the message about one that is damaged."""
    shapes: dict[tuple[str, ...], list[tuple[int, dict[str, Any]]]] = {}
    for place in places:
        try:
            record = json.loads(lines[place])
        except ValueError:
            record = None
        if _is_record(record):
            shapes.setdefault(tuple(record), []).append((place, record))
        # The last line may be one that the run is writing now, or was killed while it did.
        elif place < len(lines) - 1:
            raise ConfigError(f"{path}, line {place + 1}: expected a JSON object with {STEP}")
    return [
        _Block(
            kept,
            np.array([place for place, _ in found]),
            np.array([int(record[STEP]) for _, record in found]),
            [np.array([_number(record[key]) for _, record in found]) for key in kept],
        )
        for keys, found in shapes.items()
        for kept in [[key for key in keys if key != STEP and wanted(key)]]
    ]


def _is_record(record: Any) -> bool:
    return isinstance(record, dict) and math.isfinite(_number(record.get(STEP)))


def _joined(parts: Sequence[tuple[_Block, int]]) -> Series:
    steps = np.concatenate([block.steps for block, _ in parts])
    values = np.concatenate([block.columns[row] for block, row in parts])
    if (np.diff(steps) <= 0).any():
        order = np.lexsort((np.concatenate([block.lines for block, _ in parts]), steps))
        steps, values = steps[order], values[order]
        latest = np.append(steps[1:] != steps[:-1], True)
        steps, values = steps[latest], values[latest]
    return Series(steps, values)


def _number(value: Any) -> float:
    number = float(value) if isinstance(value, int | float) else math.nan
    return number if math.isfinite(number) else math.nan


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
