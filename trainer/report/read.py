"""What a run directory says, read without torch: `metrics.jsonl`, `config.yaml`, `overrides.yaml`, `meta.json`."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.config import ConfigError

STEP = "train/step"
LIVE = "live"
"""Name of the live weights wherever averages are told apart by name."""

Series = list[tuple[int, float]]
"""(step, value) by rising step; a value that was not finite is NaN."""


@dataclass(frozen=True)
class Run:
    """A run directory's records and facts."""

    path: Path
    records: list[dict[str, float]]
    """One per step, by rising step."""
    overrides: list[str]
    """`key=value` as typed on the command line."""
    meta: dict[str, Any]
    """`meta.json`; empty if the run has none."""

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.resolve().name

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.yaml` as nested dictionaries; read when asked for, a comparison of many runs never does."""
        content = _read_yaml(self.path / "config.yaml")
        return content if isinstance(content, dict) else {}

    def series(self, key: str) -> Series:
        """All values logged under `key`."""
        return [(int(record[STEP]), record[key]) for record in self.records if key in record]

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
        for key in self._keys:
            if key.startswith("eval/ema/"):
                found[key.removeprefix("eval/ema/").rpartition("/")[0]] = None
            elif key.startswith("ema/") and key.endswith("/rel_l2") and "/block/" not in key:
                found[key.removeprefix("ema/").removesuffix("/rel_l2")] = None
        return list(found)

    @cached_property
    def metrics(self) -> list[str]:
        """Names of the evaluated metrics, the primary one first."""
        prefix = f"eval/{LIVE}/"
        names = [key.removeprefix(prefix) for key in self._keys if key.startswith(prefix)]
        return sorted(names, key=lambda name: name != self.primary_metric)

    @cached_property
    def _keys(self) -> list[str]:
        return list(dict.fromkeys(key for record in self.records for key in record))

    @property
    def primary_metric(self) -> str:
        """The metric that decides who won: what the task said in `meta.json`, else the loss."""
        return str(self.meta.get("primary_metric", "loss"))

    def named(self, metric: str) -> str:
        """`metric` with its unit, where `meta.json` gives one in `metric_units`."""
        unit = self.meta.get("metric_units", {}).get(metric)
        return f"{metric} ({unit})" if unit else metric

    def higher_is_better(self, metric: str) -> bool | None:
        """Direction of a metric: `meta.json` lists those of which more is better. None if it lists nothing."""
        rising = self.meta.get("higher_is_better")
        if isinstance(rising, list):
            return metric in rising
        return False if metric == "loss" else None


def read_run(path: Path) -> Run:
    """Read a run directory.

    Raises:
        ConfigError: not a run directory, or a file in it that is damaged (a torn last line of metrics is not).
    """
    if not (path / "metrics.jsonl").is_file():
        raise ConfigError(f"{path}: expected a run directory (one with a metrics.jsonl)")
    overrides = _read_yaml(path / "overrides.yaml")
    return Run(
        path=path,
        records=_read_records(path / "metrics.jsonl"),
        overrides=[str(item) for item in overrides] if isinstance(overrides, list) else [],
        meta=_read_meta(path / "meta.json"),
    )


def find_runs(path: Path) -> list[Path]:
    """`path` itself if it is a run directory, else every run directory beneath it, sorted.

    Raises:
        ConfigError: there is none.
    """
    if (path / "metrics.jsonl").is_file():
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
            if (child / "metrics.jsonl").is_file():
                yield child
            else:
                yield from _run_directories(child)


def _read_records(path: Path) -> list[dict[str, float]]:
    by_step: dict[int, dict[str, float]] = {}
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            step = int(record[STEP])
        except (ValueError, KeyError, TypeError) as error:
            # The run may be writing this line now, or was killed while it did.
            if number == len(lines):
                break
            raise ConfigError(f"{path}, line {number}: expected a JSON object with {STEP}") from error
        values = {key: _number(value) for key, value in record.items()}
        by_step[step] = by_step.get(step, {}) | values
    return [by_step[step] for step in sorted(by_step)]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _read_meta(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path}: expected JSON ({error})") from error
    return content if isinstance(content, dict) else {}


def _read_yaml(path: Path) -> Any:
    """Content of a YAML file, None if there is none. The C parser is ten times faster: sweeps have many runs."""
    if not path.is_file():
        return None
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return yaml.load(path.read_bytes(), Loader=loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: expected YAML ({str(error).splitlines()[0]})") from error
