"""Make the table of every pair of weights: which is better than which, by how much."""

import math
from dataclasses import replace
from itertools import combinations

from trainer.report.format import EMPTY_CELL, direction_text, display_name, format_difference, format_p
from trainer.report.group import Group
from trainer.report.pairs import difference, moments_of
from trainer.report.runs import Run
from trainer.report.statistics import ALPHA, Estimate, holm
from trainer.report.text.table import Line, Table, table_of
from trainer.report.verdicts import BETTER, rows_of, verdict


def full_tables(run: Run) -> list[Table]:
    """Return the table of each metric of a run, each followed by that of its pairs if there is one."""
    metrics = run.metrics or [run.primary_metric]
    both = (make(run, metric) for metric in metrics for make in (table_of, pair_table))
    return [table for table in both if table is not None]


def pair_table(source: Run | Group, metric: str) -> Table | None:
    """Make the table of all pairs of weights by one metric at the last evaluation.

    Returns:
        None with fewer than three weights, and for a run without the pairs of this evaluation.
    """
    group = Group(source.name, [source]) if isinstance(source, Run) else source
    rows = [row for row in rows_of(group, metric) if row.is_eligible]
    names = [row.weights for row in rows]
    step = max((row.last_step for row in rows), default=0)
    moments = moments_of(group, metric, step, names)
    if moments is None or len(moments.weights) < 3:
        return None
    names = [name for name in names if name in moments.weights]
    pairs = list(combinations(names, 2))
    p_values = holm([difference(moments, *pair).p for pair in pairs])
    adjusted = {frozenset(pair): p for pair, p in zip(pairs, p_values, strict=True)}
    higher = group.higher_is_better(metric)
    lines = []
    for row in (row for row in rows if row.weights in names):
        gaps = {name: difference(moments, row.weights, name) for name in names if name != row.weights}
        p_of = {name: adjusted[frozenset((row.weights, name))] for name in gaps}
        cells = [_cell(gaps[name], p_of[name], higher) if name in gaps else EMPTY_CELL for name in names]
        keys = [gaps[name].mean if name in gaps else None for name in names]
        beats_all = all(_clear(gaps[name], p_of[name], higher) == BETTER for name in gaps)
        lines.append(Line([display_name(row.weights), *cells], [row.weights, *keys], beats_all))
    unit = "seeds" if len(group.seeds) > 1 else "samples"
    direction = direction_text(higher).capitalize() or "No direction"
    return Table(
        title=f"{source.name}: {metric}, every pair at step {step}",
        headers=["row - column", *map(display_name, names)],
        lines=lines,
        notes=[
            f"Mean difference on the same {moments.count} {unit} ± its standard error. {direction}. A pair is called"
            f" better, worse or different with p up to 0.05, adjusted for all {len(pairs)} pairs (Holm); other pairs"
            " show this p. The headline tests fewer pairs, those with the best average or the live weights, so it may"
            " find a difference that this table does not.",
        ],
        metric=metric,
    )


def _cell(gap: Estimate, p: float, higher: bool | None) -> str:
    """Format the difference row - column, its standard error, and what follows for the weights of the row."""
    figure = format_difference(gap)
    if math.isnan(p):
        return figure
    return f"{figure} {_clear(gap, p, higher)}" if p <= ALPHA else f"{figure} (p {format_p(p)})"


def _clear(gap: Estimate, p: float, higher: bool | None) -> str:
    """Return the verdict on the weights of the row; one reads its gap as others minus these weights."""
    return verdict(replace(gap, mean=-gap.mean), p, higher)
