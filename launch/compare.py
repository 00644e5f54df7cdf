"""`python -m launch.compare DIR…`: compare the live weights with every average, in one run or in hundreds.

The module imports no torch, and matplotlib only to write files, so that the command answers at once.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.cli import command, split_arguments
from trainer.errors import EXIT_DONE, ConfigError, listed
from trainer.report.comparison import Comparison, combine_all
from trainer.report.first_screen import commands_of, first_screen
from trainer.report.naming import differing_settings
from trainer.report.runs import Run, find_runs, read_runs
from trainer.report.text.brief import brief, other_metrics
from trainer.report.text.comparison_table import combined_table, settings_table
from trainer.report.text.pair_table import pair_table
from trainer.report.text.table import Table, table_of, to_markdown
from trainer.report.text.terminal import print_tables
from trainer.report.verdicts import rows_of, to_csv
from trainer.rundir.files import write_atomically
from trainer.shell.commands import command_lines
from trainer.shell.printable import print_text

HELP = """\
Compare the live weights with every average (EMA), in one run or in many.

usage: python -m launch.compare DIR… [metric=NAME] [out=DIR]

  DIR      a run directory, or any directory above runs (a sweep, outputs/)
  metric=… the metric that decides, such as accuracy, or SET/loss of an evaluation set (data.eval_sets); default: the
           task's own
  out=DIR  where to write index.html, table.md, table.csv (a line per metric, group and weights), runs.csv (per run,
           with its seed and settings) and pictures; without out=, a single sweep directory gets them in its report/

Runs that differ only in their seed or their averages are one group. A winner is named only where the difference is
significant: at 95 %, over the seeds or the samples of a single run, adjusted for the number of averages. The command
prints all weights by the primary metric and a line for each other metric; the files contain all metrics in full.
Exit codes: 0 done, 2 bad input.

examples:
  python -m launch.compare outputs/2026-01-31_12-00-00_quickstart_3f9a1c
  python -m launch.compare sweeps/decays outputs out=comparison
  python -m launch.compare outputs/mine metric=shifted/loss
"""
KEYS = ("metric", "out")
MAX_RUN_TABLES = 12
"""Most runs with a table of their own on the page; with more runs, only `runs.csv` lists them."""
MAX_PRINTED = 40
"""Most lines of a table on the terminal; the page and the files contain all lines."""
MAX_DRAWN = 3
"""Most groups with figures on the page, to keep the file small; the best groups are chosen."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    return command(arguments, HELP, lambda: _compare(arguments))


def _compare(arguments: Sequence[str]) -> int:
    folders, metric, out = _parse(arguments)
    paths = [path for folder in folders for path in find_runs(folder)]
    runs = read_runs(list({path.resolve(): path for path in paths}.values()))
    if metric is not None:
        runs = _decided_by(metric, runs)
    comparisons = combine_all(runs)
    print_tables(summary_tables(runs, comparisons))
    for title, line in (pair for by_metric in comparisons for pair in commands_of(by_metric[0])):
        print_text("\n".join(command_lines(f"{title}:", [line])))
    if out is not None:
        print_text(f"written: {write_comparison(out, runs, comparisons)}")
        print("It has every run, metric and picture; table.md, table.csv, runs.csv: beside it.")
    else:
        print_text(f"Full report (every run, metric and picture): {_report_location(runs)}.")
    return EXIT_DONE


def _decided_by(metric: str, runs: Sequence[Run]) -> list[Run]:
    """Return the runs with another primary metric.

    Raises:
        ConfigError: No run has an evaluation by it.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    if metric not in names:
        raise ConfigError(
            f"metric: expected one of {listed(names, 20) or 'none, no run is evaluated'}, got {metric!r}"
        )
    return [replace(run, meta=run.meta | {"primary_metric": metric}) for run in runs]


def _parse(arguments: Sequence[str]) -> tuple[list[Path], str | None, Path | None]:
    own, rest = split_arguments(arguments, KEYS)
    folders = [Path(argument) for argument in rest]
    if own.get("out") == "":
        raise ConfigError("out: expected a directory, got nothing")
    if not folders:
        raise ConfigError("expected at least one run or sweep directory; see --help")
    out = Path(own["out"]) if "out" in own else _sweep_report(folders)
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"out={out}: expected a directory, this is a file")
    return folders, own.get("metric"), out


def _sweep_report(folders: Sequence[Path]) -> Path | None:
    """Return the `report` directory if the only argument is a writable sweep; a run already has its own report."""
    is_sweep = len(folders) == 1 and (folders[0] / "sweep.json").is_file() and os.access(folders[0], os.W_OK)
    return folders[0] / "report" if is_sweep else None


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
            tables += brief(by_metric[0].groups[0].runs[0])
        else:
            others = other_metrics(by_metric)
            tables += [combined_table(by_metric[0], MAX_PRINTED), *([others] if others else [])]
    return tables


def _report_location(runs: Sequence[Run]) -> str:
    """Return the path of a single run's report page, or how to get the files."""
    page = runs[0].path / "report" / "index.html"
    return str(page) if len(runs) == 1 and page.is_file() else "add out=DIR"


def write_comparison(out: Path, runs: Sequence[Run], comparisons: Sequence[Sequence[Comparison]]) -> Path:
    """Write tables, figures and the page of a comparison; return the path of the page."""
    # Imported here because importing matplotlib takes longer than everything else together.
    from trainer.report.page import chips, comparison_figures, html, table_part

    every = [comparison for by_metric in comparisons for comparison in by_metric]
    # A single run has a table of its own, with the same content.
    combined = [combined_table(comparison) for comparison in every if comparison.runs > 1]
    by_run = run_tables(runs)
    settings = [table for by_metric in comparisons if (table := settings_table(by_metric[0])) is not None]
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "table.md", "\n".join(map(to_markdown, [*combined, *settings, *by_run])))
    write_atomically(
        out / "table.csv", to_csv(row for comparison in every for rows in comparison.rows for row in rows)
    )
    write_atomically(
        out / "runs.csv",
        to_csv(
            (row for run in runs for metric in run.metrics for row in rows_of(run, metric)), _settings(runs)
        ),
    )
    averages = list(dict.fromkeys(name for made in every for group in made.groups for name in group.averages))
    colours = chips(averages)
    parts: list[Any] = []
    for number, by_metric in enumerate(comparisons):
        main, figures = comparison_figures(by_metric[0], out, number, MAX_DRAWN, averages)
        if number:
            parts.append(html.heading(combined_table(by_metric[0]).title))
        parts.append(html.answer(first_screen(by_metric[0]), main))
        if by_metric[0].runs > 1:
            parts += _comparison_tables(by_metric, colours)
        parts += figures
    parts += [table_part(table, colours) for table in settings]
    if by_run:
        each = [table_part(table, colours) for table in by_run]
        parts.append(html.folded("Each run by itself", each, is_open=not combined))
    index = out / "index.html"
    write_atomically(index, str(html.page("Comparison", "Live weights against every average", parts)))
    return index


def _comparison_tables(by_metric: Sequence[Comparison], colours: Mapping[str, str]) -> list[Any]:
    """Return the tables of a comparison as parts of a page: the primary metric, the others in a line each, pairs."""
    from trainer.report.page import html, table_part

    primary, *others = map(combined_table, by_metric)
    parts = [table_part(primary, colours, with_headline=False)]
    short = [table for table in (other_metrics(by_metric),) if table is not None]
    parts += [table_part(table, colours) for table in [*short, *pair_tables(by_metric[0])]]
    if others:
        full = [table_part(table, colours) for table in others]
        parts.append(html.folded("Every other metric in full", full))
    return parts


def _settings(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """Return the seed of each run by its name, and the settings in which the runs differ; "" for one without."""
    keys = ["seed", *differing_settings(runs)]
    return {run.name: {key: run.settings.get(key, "") for key in keys} for run in runs}


def run_tables(runs: Sequence[Run]) -> list[Table]:
    """Return the tables of each run and metric; none with more than MAX_RUN_TABLES runs."""
    if len(runs) > MAX_RUN_TABLES:
        return []
    return [
        table
        for run in runs
        for metric in run.metrics or [run.primary_metric]
        for table in (table_of(run, metric), pair_table(run, metric))
        if table is not None
    ]


def pair_tables(comparison: Comparison) -> list[Table]:
    """Return the tables of every pair for the best groups of several seeds."""
    best = [comparison.groups[index] for index in comparison.ranked()[:MAX_DRAWN]]
    made = (pair_table(group, comparison.metric) for group in best if len(group.seeds) > 1)
    return [table for table in made if table is not None]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
