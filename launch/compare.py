"""`python -m launch.compare DIR…`: live weights against every average, of one run or of hundreds.

No torch here, and matplotlib only when files are asked for: the answer comes at once.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import ConfigError
from trainer.report.comparison import Comparison, combine_all
from trainer.report.runs import Run, find_runs, read_runs
from trainer.report.text.brief import brief, other_metrics
from trainer.report.text.comparison_table import combined_table, settings_table
from trainer.report.text.table import Table, table_of, to_markdown
from trainer.report.text.terminal import print_tables
from trainer.report.verdicts import rows_of, to_csv
from trainer.rundir.files import write_atomically

HELP = """\
Compare the live weights with every average (EMA), in one run or in many.

usage: python -m launch.compare DIR… [out=DIR]

  DIR      a run directory, or any directory above runs (a sweep, outputs/)
  out=DIR  where to write index.html, table.md, table.csv (a line per metric, group and weights), runs.csv (per run)
           and pictures; a sweep that is compared alone gets them in its report/ without being asked

Runs that differ in nothing but their seed or their averages are one group. A winner is named only where the difference
is one: 95 %, over the seeds or the samples of the one run, adjusted for the number of averages. Printed are all
weights by the primary metric and a line for each other one; the files have all of every metric.
Exit codes: 0 done, 2 bad input.

examples:
  python -m launch.compare outputs/2026-01-31_12-00-00_quickstart_3f9a1c
  python -m launch.compare sweeps/decays outputs out=comparison
"""
MAX_RUN_TABLES = 12
"""Runs whose own tables are on the page: nobody reads more of them, `runs.csv` has them all."""
MAX_PRINTED = 40
"""Lines of a table on the terminal; the page and the files have all."""
MAX_DRAWN = 3
"""Groups whose pictures the page shows, the best ones: more would make it too heavy to send to anybody."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(HELP, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    try:
        folders, out = _parse(arguments)
        found = [path for folder in folders for path in find_runs(folder)]
        runs = read_runs(list({path.resolve(): path for path in found}.values()))
        comparisons = combine_all(runs)
        print_tables(summary_tables(runs, comparisons))
        if out is not None:
            print(f"written: {write_comparison(out, runs, comparisons)}")
            print("There, and in table.md, table.csv and runs.csv beside it: every run, metric and picture.")
        else:
            print(f"All else (every run, metric and picture): {_report_location(runs)}.")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: Sequence[str]) -> tuple[list[Path], Path | None]:
    outs = [argument.removeprefix("out=") for argument in arguments if argument.startswith("out=")]
    folders = [Path(argument) for argument in arguments if not argument.startswith("out=")]
    if len(outs) > 1 or "" in outs:
        raise ConfigError(f"out={','.join(outs)}: expected one directory")
    if not folders:
        raise ConfigError("expected at least one run or sweep directory; see --help")
    out = Path(outs[0]) if outs else _sweep_report(folders)
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"out={out}: expected a directory, this is a file")
    return folders, out


def _sweep_report(folders: Sequence[Path]) -> Path | None:
    """`report` of a sweep that is compared alone and can be written; a run has had its own since it ended."""
    alone = len(folders) == 1 and (folders[0] / "sweep.json").is_file() and os.access(folders[0], os.W_OK)
    return folders[0] / "report" if alone else None


def summary_tables(runs: Sequence[Run], comparisons: Sequence[Sequence[Comparison]]) -> list[Table]:
    """What a terminal shows: by the primary metric all weights, by each other one a line.

    Args:
        runs: All of them.
        comparisons: As `combine_all` makes them.
    """
    if not comparisons:
        return [table_of(run, run.primary_metric) for run in runs[:1]]
    tables = []
    for found in comparisons:
        (first, *_), others = found[0].groups[0].runs, other_metrics(found)
        if found[0].runs == 1:
            tables += brief(first)
        else:
            tables += [combined_table(found[0], MAX_PRINTED), *([others] if others else [])]
    return tables


def _report_location(runs: Sequence[Run]) -> str:
    """Where the rest of an answer is that was not asked for as files."""
    page = runs[0].path / "report" / "index.html"
    return str(page) if len(runs) == 1 and page.is_file() else "add out=DIR"


def write_comparison(out: Path, runs: Sequence[Run], comparisons: Sequence[Sequence[Comparison]]) -> Path:
    """Write the comparison's files: every metric, and few runs also one by one; returns its page."""
    # Imported here: matplotlib takes longer than everything else together.
    from trainer.report.text.page import comparison_figures, folded, html_table, page

    every = [comparison for found in comparisons for comparison in found]
    # A single run's own table says it all.
    combined = [combined_table(comparison) for comparison in every if comparison.runs > 1]
    by_run = run_tables(runs)
    differences = [table for found in comparisons if (table := settings_table(found[0])) is not None]
    write_atomically(out / "table.md", "\n".join(map(to_markdown, [*combined, *differences, *by_run])))
    write_atomically(
        out / "table.csv", to_csv(row for comparison in every for rows in comparison.rows for row in rows)
    )
    write_atomically(
        out / "runs.csv",
        to_csv(row for run in runs for metric in run.metrics for row in rows_of(run, metric)),
    )
    parts = ["<h1>Live weights against every average</h1>"]
    for found in comparisons:
        if found[0].runs > 1:
            primary, *others = map(combined_table, found)
            parts += map(html_table, filter(None, [primary, other_metrics(found)]))
            parts += [folded("Every other metric in full", map(html_table, others))] if others else []
    for number, found in enumerate(comparisons):
        parts += comparison_figures(found[0], out, number, MAX_DRAWN)
    parts += map(html_table, differences)
    if by_run:
        parts.append(folded("Each run by itself", map(html_table, by_run), is_open=not combined))
    index = out / "index.html"
    write_atomically(index, page("Comparison", parts))
    return index


def run_tables(runs: Sequence[Run]) -> list[Table]:
    """The table of each run and metric; none if there are too many runs to read them."""
    if len(runs) > MAX_RUN_TABLES:
        return []
    return [table_of(run, metric) for run in runs for metric in run.metrics or [run.primary_metric]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
