"""`python -m launch.compare DIR…`: live weights against every average, of one run or of hundreds.

No torch here, and matplotlib only when files are asked for: the answer comes at once.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config import ConfigError
from trainer.files import write_atomically
from trainer.report.combine import GroupRow, combine, combined_table
from trainer.report.read import Run, find_runs, read_run
from trainer.report.table import Row, Table, print_tables, rows_of, table_of, to_csv, to_markdown

HELP = """\
Compare the live weights with every average (EMA), in one run or in many.

usage: python -m launch.compare DIR… [out=DIR]

  DIR      a run directory, or any directory above runs (a sweep, outputs/)
  out=DIR  also write index.html, table.md, table.csv (a line per group), runs.csv (a line per run) and comparison.png

Runs that differ in nothing but their seed are averaged. Exit codes: 0 done, 2 bad input.

examples:
  python -m launch.compare outputs/2026-01-31_12-00-00_quickstart_3f9a1c
  python -m launch.compare sweeps/decays outputs out=comparison
"""
MAX_CURVES = 12
"""Runs whose curves the page shows: more would make it too heavy to send to anybody."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(HELP, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    try:
        folders, out = _parse(arguments)
        found = [path for folder in folders for path in find_runs(folder)]
        runs = [read_run(path) for path in {path.resolve(): path for path in found}.values()]
        by_run = [table_of(run, metric) for run in runs for metric in run.metrics or [run.primary_metric]]
        groups, combined = combine_runs(runs)
        print_tables(by_run + combined)
        if out is not None:
            print(f"written: {write_comparison(out, runs, groups, combined, by_run)}")
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
    out = Path(outs[0]) if outs else None
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"out={out}: expected a directory, this is a file")
    return folders, out


def combine_runs(runs: Sequence[Run]) -> tuple[list[GroupRow], list[Table]]:
    """One table per primary metric; none for a single run, whose own table says it all."""
    groups: list[GroupRow] = []
    tables = []
    for metric in dict.fromkeys(run.primary_metric for run in runs):
        chosen = [run for run in runs if run.primary_metric == metric]
        rows = combine(chosen, metric)
        if rows and len(runs) > 1:
            tables.append(combined_table(rows, len(chosen)))
        groups += rows
    return groups, tables


def write_comparison(
    out: Path,
    runs: Sequence[Run],
    groups: Sequence[GroupRow],
    combined: Sequence[Table],
    by_run: Sequence[Table],
) -> Path:
    """Write the comparison's files; returns its page."""
    # Imported here: matplotlib takes longer than everything else together.
    from trainer.report.page import html_table, page, picture
    from trainer.report.plots import draw_comparison, draw_curves

    rows = [row for run in runs for metric in run.metrics for row in rows_of(run, metric)]
    write_atomically(out / "table.md", "\n".join(map(to_markdown, [*combined, *by_run])))
    write_atomically(out / "table.csv", to_csv(groups, GroupRow))
    write_atomically(out / "runs.csv", to_csv(rows, Row))
    parts = ["<h1>Live weights against every average</h1>", *map(html_table, combined)]
    if len(runs) > 1 and draw_comparison(groups, out / "comparison.png"):
        parts.append(
            picture(out / "comparison.png", "Mean of the last evaluations, with the spread over runs.")
        )
    parts += map(html_table, by_run)
    for number, run in enumerate(runs[:MAX_CURVES]):
        drawn = out / f"curves_{number}.png"
        if draw_curves(run, run.primary_metric, drawn):
            parts.append(picture(drawn, f"{run.name}: evaluations and gaps"))
    index = out / "index.html"
    write_atomically(index, page("Comparison", parts))
    return index


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
