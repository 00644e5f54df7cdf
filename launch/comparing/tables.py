"""Tables of a comparison, for a terminal and for its files. Imports no torch and no matplotlib."""

from collections.abc import Sequence
from dataclasses import replace

from trainer.report.comparison import Comparison
from trainer.report.runs import Run
from trainer.report.text.brief import brief, other_metrics
from trainer.report.text.comparison_table import combined_table
from trainer.report.text.pair_table import full_tables, pair_table
from trainer.report.text.table import Table, table_of

MAX_RUN_TABLES = 12
"""Most runs with a table of their own on the page; with more runs, only `runs.csv` lists them."""
MAX_PRINTED = 40
"""Most lines of a table on the terminal; the page and the files contain all lines."""
MAX_DRAWN = 3
"""Most groups with figures on the page, to keep the file small; the best groups are chosen."""


def summary_tables(runs: Sequence[Run], comparisons: Sequence[Sequence[Comparison]]) -> list[Table]:
    """Return the tables for a terminal: all weights by the primary metric, and a line for each other metric.

    Args:
        runs: All runs.
        comparisons: Result of `combine_all(runs)`.
    """
    if not comparisons:
        return [table_of(run, run.primary_metric) for run in runs[:1]]
    tables = []
    for by_metric in comparisons:
        if by_metric[0].runs == 1:
            first, *others = brief(by_metric[0].groups[0].runs[0])
            notes = [note for note in by_metric[0].notes if note not in first.notes]
            tables += [replace(first, notes=[*first.notes, *notes]), *others]
        else:
            tables += [combined_table(by_metric[0], MAX_PRINTED), *other_metrics(by_metric)]
    return tables


def run_tables(runs: Sequence[Run]) -> list[Table]:
    """Return the tables of each run and metric; none with more than MAX_RUN_TABLES runs."""
    return [table for run in runs for table in full_tables(run)] if len(runs) <= MAX_RUN_TABLES else []


def pair_tables(comparison: Comparison) -> list[Table]:
    """Return the tables of every pair for the best groups of several seeds."""
    best = [comparison.groups[index] for index in comparison.ranked()[:MAX_DRAWN]]
    made = (pair_table(group, comparison.metric) for group in best if len(group.seeds) > 1)
    return [table for table in made if table is not None]
