"""Choose the number of samples that separates the best weights, within a bound (`trainer.eval_samples=auto`).

In a run, the last evaluation chooses the number by its first samples, and then takes as many further ones. The verdicts
rest on the further samples only. A number that was chosen by the same samples that are tested gives too many false
claims (M. A. Proschan and S. A. Hunsberger, "Designed Extension of Studies Based on Conditional Power", Biometrics 51,
1995); with one average, 12 % in place of 5 %.

No torch here: `launch.evaluate` chooses a number before it imports torch.
"""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.schema import AUTO
from trainer.errors import ConfigError
from trainer.report.pairs import needed
from trainer.report.runs import Run
from trainer.report.statistics import ALPHA
from trainer.report.verdicts import Row, best_of, rows_of
from trainer.rundir.columns import Series
from trainer.rundir.keys import LIVE
from trainer.rundir.pairs import Pairs

KEY = "trainer.eval_samples"
MOST = 16
"""Largest factor by which the number may exceed that of the samples by which it is chosen."""


@dataclass(frozen=True)
class Enough:
    """Rule for the number of further samples of the last evaluation of a run."""

    facts: Mapping[str, Any]
    """Primary metric and the directions of all metrics, as in `meta.json`."""
    left: int
    """Samples of the evaluation split after those of every evaluation."""

    @property
    def metric(self) -> str:
        """Metric that decides: the primary one, with one value per sample."""
        return str(self.facts["primary_metric"])

    def refuse_without(self, values: Container[str]) -> None:
        """Refuse a task whose primary metric has no value of each sample or no direction.

        Args:
            values: names of the metrics with one value per sample.

        Raises:
            ConfigError: The number cannot be chosen by the primary metric.
        """
        if self.metric not in values or self._run({}, None).higher_is_better(self.metric) is None:
            raise ConfigError(
                f"{KEY}: expected a number, because the primary metric {self.metric} has no value of each sample, or no"
                " direction, from which auto could choose one"
            )

    def further(self, record: Mapping[str, float], pairs: Pairs) -> int:
        """Return the number of further samples; 0 if no average can be the best or no sample is left.

        Args:
            record: record of the evaluation on its first samples.
            pairs: pairs of the same evaluation.
        """
        columns = {key: Series(np.array([pairs.step]), np.array([number])) for key, number in record.items()}
        return min(_number(self._run(columns, pairs)) or 0, self.left)

    def _run(self, columns: dict[str, Series], pairs: Pairs | None) -> Run:
        return Run(Path(), "", columns, dict(self.facts), pairs)


def samples_for(run: Run) -> int:
    """Return how many samples separate the best weights of the last evaluation by the primary metric.

    That is how many show both differences of the best average, to the live weights and to the closest other average,
    with 80 % power, if they are as large as observed; at least as many as the run used, at most MOST times as many.

    Raises:
        ConfigError: The run has no pairs, no average, or a metric without a direction.
    """
    number = _number(run)
    if number is None:
        raise ConfigError(
            f"{KEY}={AUTO}: expected a run with pairs.jsonl, averages, and a metric with a direction; type a number"
        )
    return number


def _number(run: Run) -> int | None:
    metric = run.primary_metric
    higher = run.higher_is_better(metric)
    rows = [row for row in rows_of(run, metric) if row.weights != LIVE and row.is_eligible]
    moments = run.pairs.widest(metric) if run.pairs is not None else None
    if moments is None or higher is None or not rows:
        return None
    top = best_of((row.last.value for row in rows), higher)
    best = next(row for row in rows if row.last.value == top)
    numbers = _open_questions(best, rows)
    return math.ceil(min(MOST * moments.count, max([moments.count, *numbers])))


def _open_questions(best: Row, rows: Sequence[Row]) -> list[float]:
    """Return the number of samples for each difference that the evaluation did not show."""
    numbers = []
    if best.last.gap is not None and best.last.p > ALPHA:
        numbers.append(needed(best.last.gap, ALPHA / len(rows)))
    if best.rival is not None and sum(row.may_be_best for row in rows) > 1:
        numbers.append(needed(best.rival.gap))
    return [number for number in numbers if not math.isnan(number)]
