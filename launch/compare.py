"""`python -m launch.compare DIR…`: compare the live weights with every average, in one run or in hundreds.

The module imports no torch, and matplotlib only to write files, so that the command answers at once.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch.cli import command, make_folder, parse_folder, refuse_no_path, split_arguments
from launch.comparing.files import write_comparison
from launch.comparing.tables import summary_tables
from launch.sweeps.directory import SWEEP, Sweep
from launch.sweeps.more_seeds import more_seeds
from trainer.errors import EXIT_DONE, ConfigError, listed
from trainer.report.comparison import combine_all
from trainer.report.first_screen import commands_of
from trainer.report.runs import Run, find_runs, read_runs
from trainer.report.text.terminal import print_tables
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

Runs that differ only in their seed or their averages are one group, in which forks of one run count as one seed. A
winner is named only where the difference is significant: at 95 %, over the seeds or the samples of a single run,
adjusted for the number of averages. The command prints all weights by the primary metric and a line for each other
metric; the files contain all metrics in full.
Exit codes: 0 done, 2 bad input.

examples:
  python -m launch.compare outputs/2026-01-31_12-00-00_quickstart_3f9a1c
  python -m launch.compare sweeps/decays outputs out=comparison
  python -m launch.compare outputs/mine metric=shifted/loss
"""
KEYS = ("metric", "out")


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
    if out is not None:
        make_folder(out)
    print_tables(summary_tables(runs, comparisons))
    sweep = _sweep_of(folders)
    seeds = more_seeds(sweep, comparisons[0][0]) if sweep is not None and len(comparisons) == 1 else None
    commands = [commands_of(by_metric[0], more_seeds=seeds) for by_metric in comparisons]
    for number, (title, line) in enumerate(pair for pairs in commands for pair in pairs):
        # Only the first one activates the environment.
        lines = [f"{title}:", f"  {line}"] if number else command_lines(f"{title}:", [line])
        print_text("\n".join(lines))
    if out is not None:
        print_text(f"written: {write_comparison(out, runs, comparisons, commands)}")
        print("It has every run, metric and picture; table.md, table.csv, runs.csv: beside it.")
    else:
        page = runs[0].path / "report" / "index.html"
        place = page if len(runs) == 1 and page.is_file() else "add out=DIR"
        print_text(f"Full report (every run, metric and picture): {place}.")
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
    refuse_no_path(rest, KEYS)
    folders = [Path(argument) for argument in rest]
    out = parse_folder(own)
    if not folders:
        raise ConfigError("expected at least one run or sweep directory; see --help")
    return folders, own.get("metric"), out or _sweep_report(folders)


def _sweep_report(folders: Sequence[Path]) -> Path | None:
    """Return the `report` directory if the only argument is a writable sweep; a run already has its own report."""
    is_sweep = len(folders) == 1 and (folders[0] / SWEEP).is_file() and os.access(folders[0], os.W_OK)
    return folders[0] / "report" if is_sweep else None


def _sweep_of(folders: Sequence[Path]) -> Sweep | None:
    """Return the sweep if the only argument is one; print a note if its record cannot be read."""
    if len(folders) != 1 or not (folders[0] / SWEEP).is_file():
        return None
    try:
        return Sweep.open(folders[0])
    except ConfigError as error:  # the runs themselves can be compared
        print_text(f"note: {error}")
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
