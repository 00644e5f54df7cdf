"""Choose the number of samples of `trainer.eval_samples=auto`: what separates the best weights, within a bound."""

import math
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import ConfigError
from trainer.report.pairs import needed
from trainer.report.runs import Run, is_compared, read_run
from trainer.report.statistics import ALPHA
from trainer.report.verdicts import Row, best_of, rows_of
from trainer.rundir.keys import LIVE

KEY = "trainer.eval_samples"
AUTO = f"{KEY}=auto"
MOST = 16
"""Largest factor by which an evaluation may have more samples than those of the run."""


def with_number(path: Path, overrides: Sequence[str]) -> list[str]:
    """Return the overrides with a number in place of `trainer.eval_samples=auto`, if it is among them.

    Args:
        path: run directory.
        overrides: changes to the configuration, as typed.

    Raises:
        ConfigError: `auto` is among them, and the run has no evaluation from which the number follows.
    """
    if AUTO not in overrides:
        return list(overrides)
    number = samples_for(read_run(path, is_compared))
    return [f"{KEY}={number}" if override == AUTO else override for override in overrides]


def samples_for(run: Run) -> int:
    """Return how many samples separate the best weights of the last evaluation by the primary metric.

    That is how many show both differences of the best average, to the live weights and to the closest other average,
    with 80 % power, if they are as large as observed; at least as many as the run used, at most MOST times as many.

    Raises:
        ConfigError: The run has no pairs, no average, or a metric without a direction.
    """
    metric = run.primary_metric
    higher = run.higher_is_better(metric)
    rows = [row for row in rows_of(run, metric) if row.weights != LIVE and row.is_eligible]
    if run.pairs is None or metric not in run.pairs.metrics or higher is None or not rows:
        raise ConfigError(
            f"{AUTO}: expected a run with pairs.jsonl, averages, and a metric with a direction; type a number"
        )
    used = run.pairs.metrics[metric].count
    top = best_of((row.last.value for row in rows), higher)
    best = next(row for row in rows if row.last.value == top)
    return min(MOST * used, max(used, *map(_rounded_up, _open_questions(best, rows, used))))


def _open_questions(best: Row, rows: Sequence[Row], used: int) -> list[float]:
    """Return the number of samples for each difference that the evaluation did not show."""
    numbers = [float(used)]
    if best.last.gap is not None and best.last.p > ALPHA:
        numbers.append(needed(best.last.gap))
    if best.rival is not None and sum(row.may_be_best for row in rows) > 1:
        numbers.append(needed(best.rival.gap))
    return [number for number in numbers if not math.isnan(number)]


def _rounded_up(number: float) -> int:
    return math.ceil(min(number, 1e12))
