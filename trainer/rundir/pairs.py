"""Write and read `pairs.jsonl`: what every paired comparison of an evaluation needs.

Each line is one evaluation, with the moments of each metric over its samples:

    {"train/step": 500, "pairs": {"loss": {
        "samples": 256,
        "weights": ["live", "0.9", "0.97"],
        "means": [1.5173, 1.4431, 1.4283],
        "products": [[24.1], [-1.9, 3.2], [-2.4, 3.6, 4.4]]}}}

`weights` are those whose values are all finite, and below 1e150 so that their products are finite too. `means` are
their means over the samples. `products` is the lower triangle of the centred cross products of W columns: the values of
the first weights, and of each further one its values less those of the first. The covariance of the values follows from
them without the rounding error of nearly equal values. A line has W (W + 3) / 2 numbers a metric, whatever the
number of samples.

A race of the averages (`trainer.eval_policy=race`) also writes `"race": {"loss": [...]}`: a list of such moments, of
all weights that were still evaluated, before each elimination. `"pairs"` then has the weights with all samples only.
Two weights are compared on the samples that both have (`Pairs.common`), never one mean with another of fewer samples.

With `trainer.eval_samples=auto` the last line also has `"further": {"loss": {...}}`: the moments of the primary metric
on samples that come after all of the others. The verdicts of this evaluation rest on them.

The file is written, synced and cut as `metrics.jsonl` is. A run of an earlier version has none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import ConfigError
from trainer.rundir.files import parse_json
from trainer.rundir.keys import STEP
from trainer.rundir.records import last_line

PAIRS = "pairs.jsonl"

Array = NDArray[np.float64]

MOST_SAMPLES = 2**53
"""Largest number of samples that a line may have; larger whole numbers are not exact as float64."""
TOO_LARGE = 1e150
"""Absolute value from which weights have no moments, because the sum of squares could overflow."""


@dataclass(frozen=True)
class Moments:
    """Moments of several weights over the same samples."""

    weights: tuple[str, ...]
    """Names of the W weights; at least one."""
    count: int
    """Number of samples, or of seeds."""
    means: Array
    """`[W]`, mean of the values of each weights."""
    products: Array
    """`[W, W]`, centred cross products of the first weights' values and of all others' differences to them."""

    @classmethod
    def of(cls, values: Mapping[str, Array]) -> "Moments | None":
        """Return the moments of the weights whose values are all finite and below TOO_LARGE; None if there are none.

        Args:
            values: values `[count]` by weights, on the same samples in the same order.
        """
        finite = {name: own for name, own in values.items() if len(own) and (np.abs(own) < TOO_LARGE).all()}
        if not finite:
            return None
        table = np.stack(list(finite.values()))
        columns = np.concatenate([table[:1], table[1:] - table[:1]])
        columns -= columns.mean(axis=1, keepdims=True)
        return cls(tuple(finite), table.shape[1], table.mean(axis=1), columns @ columns.T)

    def renamed(self, names: Mapping[str, str]) -> "Moments":
        """Return the moments under new names; weights that `names` lacks keep theirs."""
        return replace(self, weights=tuple(names.get(name, name) for name in self.weights))

    def only(self, names: Sequence[str]) -> "Moments | None":
        """Return the moments of some of the weights; None if there are none of them."""
        kept = [place for place, name in enumerate(self.weights) if name in names]
        if not kept:
            return None
        # The first of them becomes the one to which the others are differences.
        change = np.eye(len(self.weights))[kept]
        if kept[0]:
            change[0, 0] = 1.0
            change[1:, kept[0]] = -1.0
        products = change @ self.products @ change.T
        return Moments(tuple(self.weights[place] for place in kept), self.count, self.means[kept], products)

    def contrast(self, factors: Mapping[str, float]) -> tuple[float, float]:
        """Return a linear combination of the means, and its standard error over the samples.

        Args:
            factors: factor of each of some weights; their sum is zero for a paired difference.

        Returns:
            Value, and standard error; the latter is NaN for one sample, and 0 where rounding is all that differs.
        """
        vector = np.array([factors.get(name, 0.0) for name in self.weights])
        value = float(vector @ self.means)
        if self.count < 2:
            return value, float("nan")
        columns = vector.copy()
        columns[0] = vector.sum() if abs(vector.sum()) > 1e-12 * np.abs(vector).sum() else 0.0
        variance = max(0.0, float(columns @ self.products @ columns)) / (self.count - 1)
        floor = 1e-12 * float(np.abs(vector) @ np.abs(self.means))
        return value, (variance / self.count) ** 0.5 if variance > floor**2 else 0.0


@dataclass(frozen=True)
class Pairs:
    """The moments of one evaluation."""

    step: int
    metrics: Mapping[str, Moments]
    """Moments by metric; a metric without finite values is missing."""
    race: Mapping[str, Sequence[Moments]] = field(default_factory=dict)
    """Moments of the metric that decided a race, on the first samples: those before each elimination, in order."""
    further: Mapping[str, Moments] = field(default_factory=dict)
    """Moments of the primary metric on further samples, none of which are among those of `metrics`."""

    @classmethod
    def of(
        cls,
        step: int,
        values: Mapping[str, Mapping[str, Array]],
        race: Mapping[str, Sequence[Mapping[str, Array]]] | None = None,
        further: Mapping[str, Mapping[str, Array]] | None = None,
    ) -> "Pairs":
        """Return the pairs of an evaluation.

        Args:
            step: step of the evaluated weights.
            values: for each metric, the values `[samples]` by weights.
            race: for the metric that decided a race, the values before each elimination by weights.
            further: for the primary metric, the values on further samples by weights.
        """
        parts = {metric: list(map(Moments.of, own)) for metric, own in (race or {}).items()}
        return cls(
            step,
            _moments_of(values),
            {metric: [part for part in own if part is not None] for metric, own in parts.items() if own},
            _moments_of(further or {}),
        )

    def widest(self, metric: str) -> Moments | None:
        """Return the moments on which the verdicts of this evaluation rest; None without a finite value."""
        return self.further.get(metric, self.metrics.get(metric))

    def common(self, metric: str, one: str, other: str) -> Moments | None:
        """Return the moments over the most samples that two weights have in common; None without any."""
        candidates = [*self.race.get(metric, ()), *([self.metrics[metric]] if metric in self.metrics else [])]
        both = [moments for moments in candidates if {one, other} <= set(moments.weights)]
        return max(both, key=lambda moments: moments.count, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return the content of a line, without its step."""
        content: dict[str, Any] = {"pairs": {metric: _to_json(own) for metric, own in self.metrics.items()}}
        if self.race:
            content["race"] = {metric: list(map(_to_json, own)) for metric, own in self.race.items()}
        if self.further:
            content["further"] = {metric: _to_json(own) for metric, own in self.further.items()}
        return content


def _moments_of(values: Mapping[str, Mapping[str, Array]]) -> dict[str, Moments]:
    found = {metric: Moments.of(own) for metric, own in values.items()}
    return {metric: moments for metric, moments in found.items() if moments is not None}


def _to_json(moments: Moments) -> dict[str, Any]:
    rows = moments.products.tolist()
    return {
        "samples": moments.count,
        "weights": list(moments.weights),
        "means": moments.means.tolist(),
        "products": [row[: place + 1] for place, row in enumerate(rows)],
    }


def read_last_pairs(path: Path) -> Pairs | None:
    """Read the last complete line of a `pairs.jsonl`; None if the file is missing or has none.

    Raises:
        ConfigError: The line has no pairs, or the file is no regular file.
    """
    line = last_line(path)
    if line is None:
        return None
    try:
        content = parse_json(line)
        metrics, race, further = content["pairs"], content.get("race", {}), content.get("further", {})
        return Pairs(
            int(content[STEP]),
            {name: _moments(own) for name, own in metrics.items()},
            {name: [_moments(part) for part in own] for name, own in race.items()},
            {name: _moments(own) for name, own in further.items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ConfigError(
            f"{path}, last line: expected the pairs of an evaluation, got {line[:60]!r}; restore the file"
            " from a copy, or remove this line"
        ) from error


def _moments(content: Mapping[str, Any]) -> Moments:
    count = int(content["samples"])
    names = tuple(map(str, content["weights"]))
    means = np.array(content["means"], dtype=np.float64)
    rows = content["products"]
    if not 1 <= count <= MOST_SAMPLES:
        raise ValueError("the number of samples is out of range")
    if not names or len(set(names)) < len(names) or means.shape != (len(names),) or len(rows) != len(names):
        raise ValueError("the numbers of weights differ, or one is there twice")
    products = np.zeros((len(names), len(names)))
    for place, row in enumerate(rows):
        products[place, : place + 1] = np.array(row, dtype=np.float64).reshape(place + 1)
    products += np.tril(products, -1).T
    if not ((np.abs(means) < TOO_LARGE).all() and np.isfinite(products).all()):
        raise ValueError("a number is not finite or too large")
    if (products.diagonal() < 0).any():
        raise ValueError("a sum of squares is negative")
    return Moments(names, count, means, products)
