"""Score the live weights and every average at the last and at the best evaluation, and decide which weights win."""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trainer.report.group import Array, Evaluations, Group
from trainer.report.pairs import (
    Rival,
    closest,
    difference,
    difference_over_runs,
    eliminated_at,
    further_moments,
    moments_of_each,
    not_excluded,
)
from trainer.report.runs import Run
from trainer.report.statistics import ALPHA, Estimate, holm, one_seed_estimate, paired_estimate, spread
from trainer.rundir.keys import LIVE
from trainer.shell.printable import csv_cell

BETTER, WORSE = "better", "worse"
MISSED = "not in every last evaluation"
"""Instead of a verdict, for an average that at least one seed did not evaluate at the last step."""
ELIMINATED = "eliminated"
"""Instead of a verdict, for an average that a race eliminated at the last step, by the primary metric."""


@dataclass(frozen=True)
class Score:
    """Result of some weights at one evaluation, over the seeds of a group."""

    value: float
    """Mean over the seeds; NaN if the value of one seed is not finite."""
    sd: float | None
    """Standard deviation over the seeds; None for a single seed."""
    gap: Estimate | None = None
    """Live minus average: over the seeds if there are several, else by `one_seed_estimate`."""
    p: float = math.nan
    """p-value of the gap, adjusted for all averages of the group (Holm); NaN if it was not tested."""
    verdict: str = ""
    """Comparison of the average with the live weights; empty for the live weights, and without a test."""
    winner: bool = False
    """Whether these weights win: the best average if it is better than live, or live if every average is worse."""


@dataclass(frozen=True)
class Row:
    """Scores of one metric for the live weights or one average of a group (also of one run)."""

    group: str
    metric: str
    weights: str
    seeds: int
    last_step: int
    last: Score
    best_steps: tuple[int, int] | None
    """Smallest and largest best step over the seeds; None for a metric without a direction."""
    best: Score | None
    """Score of each seed at its own best step.

    With several seeds, the gap is best live minus best average. With one run, it is the gap at the average's best step,
    and it is not tested because that step was chosen by the same values.
    """
    best_of_all: bool = False
    """Whether `best` is the best value of all weights."""
    may_be_best: bool = False
    """Whether this is an average that is not clearly worse than the best average at the last evaluation."""
    rival: Rival | None = None
    """For the best average, the other average that is closest to it; None for all others, and without paired values."""
    further_samples: int = 0
    """Number of further samples on which `last` rests, in place of those of all evaluations (`best`); 0 for none."""

    @property
    def is_eligible(self) -> bool:
        """Whether the last value can be the best: it is finite and no seed missed the last evaluation."""
        return self.last.verdict not in (MISSED, ELIMINATED) and math.isfinite(self.last.value)


def best_of(values: Iterable[float], higher_is_better: bool) -> float | None:
    """Return the best finite value; None if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return (max if higher_is_better else min)(finite, default=None)


def verdict(gap: Estimate | None, p: float, higher_is_better: bool | None) -> str:
    """Compare an average with the live weights; `better` and `worse` need an adjusted `p` of at most ALPHA.

    A gap is live minus average: if lower values are better, a positive gap means that the average is better.
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
    """Return a row for the live weights and for each evaluated average; no rows without an evaluation."""
    group = Group(source.name, [source]) if isinstance(source, Run) else source
    evaluations = group.evaluations(metric)
    if not evaluations.values:
        return []
    higher = group.higher_is_better(metric)
    samples = group.runs[0].eval_samples(metric)
    rows = [_row(group.name, metric, name, evaluations, higher, samples) for name in evaluations.values]
    last_step = max(row.last_step for row in rows)
    seeds = max(row.seeds for row in rows if row.last_step == last_step)
    # Weights that some seed did not evaluate at the last step take no part in the decision.
    complete = [row.last_step == last_step and row.seeds == seeds for row in rows]
    rows = _on_further_samples(rows, group, last_step)
    last = _with_verdicts([row.last for row in rows], complete, higher)
    lost = {own.weights for own in eliminated_at(group, metric, last_step)}
    rows = [
        replace(row, last=replace(score, verdict=ELIMINATED) if row.weights in lost else score)
        for row, score in zip(rows, last, strict=True)
    ]
    if higher is None:
        return rows
    top = best_of((row.best.value for row in rows if row.best), higher)
    if len(group.seeds) > 1:
        has_best = [row.best is not None and ok for row, ok in zip(rows, complete, strict=True)]
        best = _with_verdicts([row.best or row.last for row in rows], has_best, higher)
        rows = [replace(row, best=row.best and score) for row, score in zip(rows, best, strict=True)]
    candidates = _possibly_best(rows, group, higher)
    return [
        replace(
            row,
            best_of_all=row.best is not None and row.best.value == top,
            may_be_best=row.weights in candidates,
            rival=candidates.get(row.weights),
        )
        for row in rows
    ]


def _row(
    group: str, metric: str, name: str, evaluations: Evaluations, higher: bool | None, samples: float
) -> Row:
    values = evaluations.values[name]
    column = int(np.flatnonzero(~np.isnan(values).all(axis=0))[-1])
    evaluated = ~np.isnan(values[:, column])
    gap = None if name == LIVE else _gap(evaluations, name, np.flatnonzero(evaluated), column, samples)
    best_steps, best = (None, None) if higher is None else _best(evaluations, name, higher, samples)
    return Row(
        group=group,
        metric=metric,
        weights=name,
        seeds=int(evaluated.sum()),
        last_step=int(evaluations.steps[column]),
        last=_score(values[evaluated, column], gap),
        best_steps=best_steps,
        best=best,
    )


def _on_further_samples(rows: Sequence[Row], group: Group, step: int) -> list[Row]:
    """Replace the last scores of a single run by those on its further samples, if it has any."""
    moments = further_moments(group, rows[0].metric, step, [row.weights for row in rows])
    if moments is None:
        return list(rows)
    means = dict(zip(moments.weights, moments.means.tolist(), strict=True))

    def replaced(row: Row) -> Row:
        if row.last_step != step:
            return row
        gap = None if row.last.gap is None else Estimate(math.nan, math.nan, 0)
        if gap is not None and {row.weights, LIVE} <= means.keys():
            gap = difference(moments, LIVE, row.weights)
        score = Score(means.get(row.weights, math.nan), None, gap)
        return replace(row, last=score, further_samples=moments.count)

    return list(map(replaced, rows))


def _score(values: Array, gap: Estimate | None) -> Score:
    if not np.isfinite(values).all():
        return Score(math.nan, None, gap)
    return Score(float(values.mean()), spread(values) if len(values) > 1 else None, gap)


def _gap(
    evaluations: Evaluations, name: str, seeds: NDArray[np.intp], column: int, samples: float
) -> Estimate | None:
    is_one = len(seeds) == 1
    own = np.flatnonzero(evaluations.seed_of_run == seeds[0]) if is_one else seeds
    gaps = (evaluations.run_gaps if is_one else evaluations.gaps)[name][own, column]
    own, gaps = own[~np.isnan(gaps)], gaps[~np.isnan(gaps)]
    if len(gaps) == 0:
        return None
    gaps = np.where(np.isinf(gaps), np.nan, gaps)
    if is_one:
        return one_seed_estimate(gaps, evaluations.run_errors[name][own, column], samples)
    return paired_estimate(gaps)


def _best(
    evaluations: Evaluations, name: str, higher: bool, samples: float
) -> tuple[tuple[int, int] | None, Score | None]:
    """Return the smallest and largest best step over the seeds, and the score there."""
    columns = _best_columns(evaluations.values[name], higher)
    if columns is None:
        return None, None
    seeds = np.arange(len(columns))
    values = evaluations.values[name][seeds, columns]
    gap = None
    if name != LIVE and len(seeds) == 1:
        gap = _gap(evaluations, name, seeds, int(columns[0]), samples)
    elif name != LIVE and LIVE in evaluations.values:
        live = _best_columns(evaluations.values[LIVE], higher)
        gap = None if live is None else paired_estimate(evaluations.values[LIVE][seeds, live] - values)
    steps = evaluations.steps[columns]
    return (int(steps.min()), int(steps.max())), _score(values, gap)


def _best_columns(values: Array, higher: bool) -> NDArray[np.intp] | None:
    """Return the column of each seed's best finite value; None if a seed has no finite value."""
    cost = np.where(np.isfinite(values), -values if higher else values, np.inf)
    columns = cost.argmin(axis=1)
    return columns if np.isfinite(cost[np.arange(len(cost)), columns]).all() else None


def _with_verdicts(scores: Sequence[Score], complete: Sequence[bool], higher: bool | None) -> list[Score]:
    """Add adjusted p-values, verdicts and, for a metric with a direction, the winner.

    Only averages have a gap. A score that is not `complete`, because a seed lacks it, gets no test.
    """
    pairs = list(zip(scores, complete, strict=True))
    adjusted = holm([score.gap.p if score.gap and ok else math.nan for score, ok in pairs])
    decided = [
        replace(score, p=p, verdict=verdict(score.gap, p, higher) if ok else MISSED)
        for (score, ok), p in zip(pairs, adjusted, strict=True)
    ]
    if higher is None:
        return decided
    eligible = [index for index, ok in enumerate(complete) if ok and math.isfinite(decided[index].value)]
    if eligible:
        leader = (max if higher else min)(eligible, key=lambda index: decided[index].value)
        won = _wins(decided[leader], [decided[index] for index in eligible])
        decided[leader] = replace(decided[leader], winner=won)
    return decided


def _wins(best: Score, scores: Sequence[Score]) -> bool:
    """Return whether the best of finite scores is clearly the best: an average beats live, live beats all averages."""
    if best.gap is not None:
        return best.verdict == BETTER
    verdicts = [score.verdict for score in scores if score.gap is not None]
    # Live weights without a finite average to compare with are not a winner.
    return bool(verdicts) and all(text == WORSE for text in verdicts)


def _possibly_best(rows: Sequence[Row], group: Group, higher: bool) -> dict[str, Rival | None]:
    """Return the averages that are not clearly worse than the best one (see `trainer.report.statistics`).

    Returns:
        For each of them None, and for the best one its closest rival, if there is one.
    """
    averages = [row for row in rows if row.weights != LIVE and row.is_eligible]
    if not averages:
        return {}
    leader = (max if higher else min)(averages, key=lambda row: row.last.value)
    moments = moments_of_each(group, leader.metric, leader.last_step, [row.weights for row in averages])
    others = [row for row in averages if row is not leader]
    paired = [difference_over_runs(moments, row.weights, leader.weights) for row in others]
    rivals = {
        row.weights: gap or _difference_by_live(row, leader) for row, gap in zip(others, paired, strict=True)
    }
    return {
        **dict.fromkeys(not_excluded(rivals)),
        leader.weights: closest(rivals) if all(paired) else None,
    }


def _difference_by_live(row: Row, leader: Row) -> Estimate:
    """Bound the difference of one seed by the gaps to the live weights."""
    mean, gaps = row.last.value - leader.last.value, (leader.last.gap, row.last.gap)
    if row.seeds > 1 or gaps[0] is None or gaps[1] is None:
        return Estimate(mean, math.nan, 0)
    return Estimate(mean, gaps[0].se + gaps[1].se, min(gaps[0].df, gaps[1].df))


_SCORE_COLUMNS = ("sd", "gap", "gap_se", "gap_low", "gap_high", "p", "verdict", "winner")
COLUMNS = [
    *("group", "metric", "weights", "seeds", "last_step", "last", "last_sd", *_SCORE_COLUMNS[1:]),
    *("best_first_step", "best_last_step", "best", *(f"best_{name}" for name in _SCORE_COLUMNS)),
    *("best_of_all", "may_be_best", "p_adjusted_for"),
]
"""Columns of `table.csv` and `runs.csv`."""


def to_csv(rows: Iterable[Row], settings: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """Format one line per row in full precision; missing values are empty cells.

    Args:
        rows: Rows of groups or of single runs.
        settings: Further columns by the name of a group: the same keys for all, each with its value.
    """
    settings = settings or {}
    keys = list(next(iter(settings.values()), {}))
    rows = list(rows)
    tested = Counter((row.group, row.metric) for row in rows if not math.isnan(row.last.p))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *keys])
    for row in rows:
        first, last = row.best_steps or (None, None)
        cells = [row.group, row.metric, row.weights, row.seeds, row.last_step, *_cells(row.last)]
        cells += [first, last, *_cells(row.best), row.best_of_all, row.may_be_best]
        count = tested[row.group, row.metric] if row.weights != LIVE else 0
        cells.append(f"Holm, {count} averages" if count > 1 else "")
        cells += [settings[row.group][key] for key in keys]
        writer.writerow(
            "" if isinstance(cell, float) and math.isnan(cell) else csv_cell(cell) for cell in cells
        )
    return text.getvalue()


def _cells(score: Score | None) -> list[float | str | None]:
    if score is None:
        return [None] * 9
    gap = score.gap
    estimate = [gap.mean, gap.se, *gap.interval] if gap else [None] * 4
    return [score.value, score.sd, *estimate, score.p, score.verdict, score.winner]
