"""Many runs in one table: grouped by the overrides in which they differ, seeds within a group averaged."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.report.read import LIVE, Run
from trainer.report.table import Line, Row, Table, best_of, gap_text, label, rows_of, value, verdict

IGNORED = ("run_dir", "resume", "sweep_dir", "seed")
"""Overrides that say where or how often a run was made, not what it is."""


@dataclass(frozen=True)
class GroupRow:
    """One metric of the live weights or of one average, over the runs of a group at their last evaluations."""

    group: str
    metric: str
    weights: str
    runs: int
    last: float
    """Mean over the runs."""
    spread: float | None
    """Standard deviation over the runs; None for a single one."""
    gap: float | None
    """Mean of live minus average."""
    gap_se: float | None
    """Its standard error: from the spread over runs, or of a single run from its samples."""
    verdict: str
    winner: bool
    """Best mean of the whole comparison."""


def group_names(runs: Sequence[Run]) -> list[str]:
    """For each run the overrides that not all runs share, as `key=value, …`; its name if it was given none."""
    chosen = [dict(_split(override) for override in run.overrides) for run in runs]
    keys = sorted(
        {key for keys in chosen for key in keys if key not in IGNORED and not key.startswith("hydra.")}
    )
    differing = [key for key in keys if len({one.get(key) for one in chosen}) > 1]
    return [
        ", ".join(f"{key}={one.get(key, '(default)')}" for key in differing)
        or (run.name if not run.overrides else "same overrides")
        for run, one in zip(runs, chosen, strict=True)
    ]


def _split(override: str) -> tuple[str, str]:
    key, _, chosen = override.partition("=")
    return key.lstrip("+~"), chosen


def combine(runs: Sequence[Run], metric: str) -> list[GroupRow]:
    """Rows by group, the live weights first in each; runs without an evaluation of `metric` are left out.

    Args:
        runs: Runs that agree on the direction of `metric`.
        metric: Name of an evaluated metric.
    """
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for name, run in sorted(zip(group_names(runs), runs, strict=True), key=lambda pair: pair[0]):
        for row in rows_of(run, metric):
            groups[name, row.weights].append(row)
    if not groups:
        return []
    higher = runs[0].higher_is_better(metric)
    means = {key: statistics.fmean(row.last for row in rows) for key, rows in groups.items()}
    top = None if higher is None else best_of(means.values(), higher)
    keys = sorted(groups, key=lambda key: (key[0], key[1] != LIVE))
    return [_group_row(key, groups[key], higher, is_top=means[key] == top) for key in keys]


def _group_row(key: tuple[str, str], rows: Sequence[Row], higher: bool | None, *, is_top: bool) -> GroupRow:
    gaps = [row.gap for row in rows if row.gap is not None]
    gap = statistics.fmean(gaps) if gaps else None
    gap_se = rows[0].gap_se
    if len(gaps) > 1:
        gap_se = _deviation(gaps) / math.sqrt(len(gaps))
    return GroupRow(
        group=key[0],
        metric=rows[0].metric,
        weights=key[1],
        runs=len(rows),
        last=statistics.fmean(row.last for row in rows),
        spread=_deviation([row.last for row in rows]) if len(rows) > 1 else None,
        gap=gap,
        gap_se=gap_se,
        verdict=verdict(gap, gap_se, higher),
        winner=is_top,
    )


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation; NaN if a value is not finite (`statistics` raises)."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def combined_table(rows: Sequence[GroupRow], runs: int) -> Table:
    """The comparison for people."""
    metric = rows[0].metric
    headers = ["runs that differ in", "weights", "runs", metric, "spread (SD)", "gap ± SE", "against live"]
    lines = [
        Line(
            cells=[
                row.group,
                label(row.weights),
                str(row.runs),
                value(row.last),
                value(row.spread),
                gap_text(row.gap, row.gap_se),
                row.verdict or "-",
            ],
            keys=[row.group, row.weights, row.runs, row.last, row.spread, row.gap, row.verdict],
            marked=row.winner,
        )
        for row in rows
    ]
    won = next((row for row in rows if row.winner), None)
    told = f"Best by {metric}: {label(won.weights)} of {won.group}, {value(won.last)}." if won else ""
    notes = [
        "At each run's last evaluation; mean over the runs of a line, which differ in nothing or in their seed. "
        "gap: live minus EMA; ± its standard error, over runs where there are several, else over samples."
    ]
    return Table(f"{runs} runs: {metric}", headers, lines, told, notes)
