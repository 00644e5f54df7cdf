"""Where the live weights and every average stand at the last evaluation and at the best, and who won."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trainer.report.group import Array, Evaluations, Group
from trainer.report.runs import LIVE, Run
from trainer.report.statistics import ALPHA, Estimate, holm, paired_estimate

BETTER, WORSE = "better", "worse"
MISSED = "not in every last evaluation"
"""Instead of a verdict: of an average that some seed, or all, did not evaluate at the last step."""


@dataclass(frozen=True)
class Score:
    """Some weights at one evaluation, over the seeds of a group."""

    value: float
    """Mean over the seeds; NaN if one of them is not finite."""
    sd: float | None
    """Standard deviation over the seeds; None for a single one."""
    gap: Estimate | None = None
    """Live minus average: over seeds where there are several, else over the samples of the evaluation."""
    p: float = math.nan
    """Of no gap, adjusted for all averages of the group (Holm). NaN: no test."""
    verdict: str = ""
    """The average against the live weights; empty for the live weights and where nothing was tested."""
    winner: bool = False
    """The best of the group, and clearly so: an average that is better than live, or live where all are worse."""


@dataclass(frozen=True)
class Row:
    """One metric of the live weights or of one average in a group; a single run is a group of one."""

    group: str
    metric: str
    weights: str
    seeds: int
    last_step: int
    last: Score
    best_steps: tuple[int, int] | None
    """Earliest and latest over the seeds; None for a metric whose direction nobody said."""
    best: Score | None
    """Each seed at its own best step. Of several seeds the gap is best live minus best average; of one run it is that
    of the average's best step, and is not tested: the step was chosen by it."""
    best_of_all: bool = False
    """Best of all weights at their own best steps."""
    may_be_best: bool = False
    """An average that is not clearly worse than the best average at the last evaluation."""

    @property
    def is_eligible(self) -> bool:
        """Whether its last value can be the best: it is finite, and was there in all seeds at the last evaluation."""
        return self.last.verdict != MISSED and math.isfinite(self.last.value)


def best_of(values: Iterable[float], higher_is_better: bool) -> float | None:
    """The best finite value, None if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return (max if higher_is_better else min)(finite, default=None)


def verdict(gap: Estimate | None, p: float, higher_is_better: bool | None) -> str:
    """The average against the live weights; `better` and `worse` only if the adjusted `p` says so.

    Gaps are live minus average: above 0 the average is better, unless the metric is one that should rise.
    """
    if gap is None:
        return ""
    if not math.isfinite(gap.mean):
        return "not finite"
    if math.isnan(p):
        return "no standard error"
    if p > ALPHA:
        return "no clear difference"
    if higher_is_better is None:
        return "different"
    return BETTER if (gap.mean > 0) != higher_is_better else WORSE


def rows_of(source: Run | Group, metric: str) -> list[Row]:
    """A row for the live weights and for each average that was evaluated; none without an evaluation."""
    group = Group(source.name, [source]) if isinstance(source, Run) else source
    found = group.evaluations(metric)
    if not found.values:
        return []
    higher = group.higher_is_better(metric)
    samples = group.runs[0].eval_samples
    rows = [_row(group.name, metric, name, found, higher, samples) for name in found.values]
    last_step = max(row.last_step for row in rows)
    seeds = max(row.seeds for row in rows if row.last_step == last_step)
    # What missed the last evaluation, in some seed or altogether, has no part in the decision.
    whole = [row.last_step == last_step and row.seeds == seeds for row in rows]
    last = _decide([row.last for row in rows], whole, higher)
    rows = [replace(row, last=score) for row, score in zip(rows, last, strict=True)]
    if higher is None:
        return rows
    top = best_of((row.best.value for row in rows if row.best), higher)
    if len(group.seeds) > 1:
        there = [row.best is not None and ok for row, ok in zip(rows, whole, strict=True)]
        best = _decide([row.best or row.last for row in rows], there, higher)
        rows = [replace(row, best=row.best and new) for row, new in zip(rows, best, strict=True)]
    candidates = _possibly_best(rows, whole, found, higher, samples)
    return [
        replace(
            row,
            best_of_all=row.best is not None and row.best.value == top,
            may_be_best=row.weights in candidates,
        )
        for row in rows
    ]


def _row(group: str, metric: str, name: str, found: Evaluations, higher: bool | None, samples: float) -> Row:
    values = found.values[name]
    column = int(np.flatnonzero(~np.isnan(values).all(axis=0))[-1])
    there = ~np.isnan(values[:, column])
    gap = None if name == LIVE else _gap(found, name, np.flatnonzero(there), column, samples)
    best_steps, best = (None, None) if higher is None else _best(found, name, higher, samples)
    return Row(
        group=group,
        metric=metric,
        weights=name,
        seeds=int(there.sum()),
        last_step=int(found.steps[column]),
        last=_score(values[there, column], gap),
        best_steps=best_steps,
        best=best,
    )


def _score(values: Array, gap: Estimate | None) -> Score:
    if not np.isfinite(values).all():
        return Score(math.nan, None, gap)
    mean = float(values.mean())
    if len(values) == 1:
        return Score(mean, None, gap)
    sd = float(values.std(ddof=1))
    # What rounding leaves of equal values is no deviation.
    return Score(mean, sd if sd > 1e-12 * abs(mean) else 0.0, gap)


def _gap(
    found: Evaluations, name: str, seeds: NDArray[np.intp], column: int, samples: float
) -> Estimate | None:
    gaps = found.gaps[name][seeds, column]
    gaps = gaps[~np.isnan(gaps)]
    if len(gaps) == 0:
        return None
    if len(gaps) > 1:
        return paired_estimate(np.where(np.isinf(gaps), np.nan, gaps))
    error = found.errors[name][seeds, column]
    known = error[np.isfinite(error)]
    mean = float(gaps[0]) if math.isfinite(gaps[0]) else math.nan
    return Estimate(mean, float(known[0]) if len(known) else math.nan, samples - 1)


def _best(
    found: Evaluations, name: str, higher: bool, samples: float
) -> tuple[tuple[int, int] | None, Score | None]:
    chosen = _best_columns(found.values[name], higher)
    if chosen is None:
        return None, None
    rows = np.arange(len(chosen))
    values = found.values[name][rows, chosen]
    gap = None
    if name != LIVE and len(rows) == 1:
        gap = _gap(found, name, rows, int(chosen[0]), samples)
    elif name != LIVE and LIVE in found.values:
        live = _best_columns(found.values[LIVE], higher)
        gap = None if live is None else paired_estimate(found.values[LIVE][rows, live] - values)
    steps = found.steps[chosen]
    return (int(steps.min()), int(steps.max())), _score(values, gap)


def _best_columns(values: Array, higher: bool) -> NDArray[np.intp] | None:
    """Where each seed has its best finite value; None if one has none."""
    cost = np.where(np.isfinite(values), -values if higher else values, np.inf)
    chosen = cost.argmin(axis=1)
    return chosen if np.isfinite(cost[np.arange(len(cost)), chosen]).all() else None


def _decide(scores: Sequence[Score], whole: Sequence[bool], higher: bool | None) -> list[Score]:
    """With adjusted p-values, verdicts, and the winner if there is one. The first are the live weights."""
    adjusted = holm(
        [score.gap.p if score.gap and ok else math.nan for score, ok in zip(scores, whole, strict=True)]
    )
    told = [
        replace(
            score,
            p=p,
            verdict=verdict(score.gap, p, higher) if ok else MISSED,
        )
        for score, p, ok in zip(scores, adjusted, whole, strict=True)
    ]
    if higher is None:
        return told
    top = best_of((score.value for score, ok in zip(told, whole, strict=True) if ok), higher)
    for place, score in enumerate(told):
        if not whole[place] or score.value != top:
            continue
        averages = [other for other, ok in zip(told, whole, strict=True) if ok and other.gap is not None]
        if score.gap is None:
            # A diverged average is no rival, but somebody must have been beaten.
            rivals = [other.verdict for other in averages if math.isfinite(other.value)]
            won = bool(rivals) and all(text == WORSE for text in rivals)
        else:
            won = score.verdict == BETTER
        told[place] = replace(score, winner=won)
        break
    return told


def _possibly_best(
    rows: Sequence[Row], whole: Sequence[bool], found: Evaluations, higher: bool, samples: float
) -> set[str]:
    """Averages not clearly worse than the best one at the last evaluation (`trainer.report.statistics`)."""
    rivals = [
        row
        for row, ok in zip(rows, whole, strict=True)
        if ok and row.weights != LIVE and math.isfinite(row.last.value)
    ]
    top = best_of((row.last.value for row in rivals), higher)
    leader = next((row for row in rivals if row.last.value == top), None)
    if leader is None:
        return set()
    return {
        row.weights
        for row in rivals
        if row is leader or not _clearly_worse(leader, row, found, samples, len(rivals) - 1)
    }


def _clearly_worse(leader: Row, other: Row, found: Evaluations, samples: float, comparisons: int) -> bool:
    column = int(np.searchsorted(found.steps, leader.last_step))
    difference = found.values[other.weights][:, column] - found.values[leader.weights][:, column]
    difference = difference[~np.isnan(difference)]
    if len(difference) > 1:
        estimate = paired_estimate(difference)
    elif leader.last.gap and other.last.gap:
        # Both gaps are to the same live weights; how they vary together was not logged. The standard error of their
        # difference is at most the sum of theirs.
        estimate = Estimate(float(difference[0]), leader.last.gap.se + other.last.gap.se, samples - 1)
    else:
        return False
    return estimate.p * comparisons <= ALPHA


_SCORE_COLUMNS = ("sd", "gap", "gap_se", "gap_low", "gap_high", "p", "verdict", "winner")
COLUMNS = [
    *("group", "metric", "weights", "seeds", "last_step", "last", "last_sd", *_SCORE_COLUMNS[1:]),
    *("best_first_step", "best_last_step", "best", *(f"best_{name}" for name in _SCORE_COLUMNS)),
    *("best_of_all", "may_be_best"),
]
"""Of `table.csv` and `runs.csv`."""


def to_csv(rows: Iterable[Row]) -> str:
    """A line a row in full precision; what does not exist is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        first, last = row.best_steps or (None, None)
        cells = [row.group, row.metric, row.weights, row.seeds, row.last_step, *_cells(row.last)]
        cells += [first, last, *_cells(row.best), row.best_of_all, row.may_be_best]
        writer.writerow("" if isinstance(cell, float) and math.isnan(cell) else cell for cell in cells)
    return text.getvalue()


def _cells(score: Score | None) -> list[float | str | None]:
    if score is None:
        return [None] * 9
    gap = score.gap
    estimate = [gap.mean, gap.se, *gap.interval] if gap else [None] * 4
    return [score.value, score.sd, *estimate, score.p, score.verdict, score.winner]
