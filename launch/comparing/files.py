"""Files of a comparison: tables, figures and the page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.comparing.tables import MAX_DRAWN, pair_tables, run_tables
from trainer.report.comparison import Comparison
from trainer.report.first_screen import Commands, first_screen
from trainer.report.naming import differing_settings
from trainer.report.runs import Run
from trainer.report.text.brief import other_metrics
from trainer.report.text.comparison_table import combined_table, settings_table
from trainer.report.text.table import to_markdown
from trainer.report.verdicts import rows_of, to_csv
from trainer.rundir.files import write_atomically


def write_comparison(
    out: Path,
    runs: Sequence[Run],
    comparisons: Sequence[Sequence[Comparison]],
    commands: Sequence[Commands],
) -> Path:
    """Write tables, figures and the page of a comparison; return the path of the page.

    Args:
        out: Directory of the files.
        runs: All runs.
        comparisons: Result of `combine_all(runs)`.
        commands: Result of `commands_of` for each comparison.
    """
    # Imported here because importing matplotlib takes longer than everything else together.
    from trainer.report.page import chips, comparison_figures, html, table_part

    every = [comparison for by_metric in comparisons for comparison in by_metric]
    # A single run has a table of its own, with the same content.
    combined = [combined_table(comparison) for comparison in every if comparison.runs > 1]
    by_run = run_tables(runs)
    settings = [table for by_metric in comparisons if (table := settings_table(by_metric[0])) is not None]
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "table.md", "\n".join(map(to_markdown, [*combined, *settings, *by_run])))
    _write_csv(out, runs, every)
    averages = list(dict.fromkeys(name for made in every for group in made.groups for name in group.averages))
    colours = chips(averages)
    parts: list[Any] = []
    for number, (by_metric, own) in enumerate(zip(comparisons, commands, strict=True)):
        main, figures = comparison_figures(by_metric[0], out, number, MAX_DRAWN, averages)
        if number:
            parts.append(html.heading(combined_table(by_metric[0]).title))
        parts.append(html.answer(first_screen(by_metric[0], own), main))
        if by_metric[0].runs > 1:
            parts += _comparison_tables(by_metric, colours)
        else:
            shown = {note for table in by_run for note in table.notes}
            parts += [html.paragraph(note) for note in by_metric[0].notes if note not in shown]
        parts += figures
    parts += [table_part(table, colours) for table in settings]
    if by_run:
        each = [table_part(table, colours) for table in by_run]
        parts.append(html.folded("Each run by itself", each, is_open=not combined))
    index = out / "index.html"
    write_atomically(index, str(html.page("Comparison", "Live weights against every average", parts)))
    return index


def _write_csv(out: Path, runs: Sequence[Run], every: Sequence[Comparison]) -> None:
    """Write `table.csv`, a line per metric, group and weights, and `runs.csv`, the same per run with its settings."""
    combined = (row for comparison in every for rows in comparison.rows for row in rows)
    write_atomically(out / "table.csv", to_csv(combined))
    keys = ["seed", *differing_settings(runs)]
    settings = {run.name: {key: run.settings.get(key, "") for key in keys} for run in runs}
    by_run = (row for run in runs for metric in run.metrics for row in rows_of(run, metric))
    write_atomically(out / "runs.csv", to_csv(by_run, settings))


def _comparison_tables(by_metric: Sequence[Comparison], colours: Mapping[str, str]) -> list[Any]:
    """Return the tables of a comparison as parts of a page: the primary metric, the others in a line each, pairs."""
    from trainer.report.page import html, table_part

    primary, *others = map(combined_table, by_metric)
    parts = [table_part(primary, colours, with_headline=False)]
    parts += [table_part(table, colours) for table in [*other_metrics(by_metric), *pair_tables(by_metric[0])]]
    if others:
        full = [table_part(table, colours) for table in others]
        parts.append(html.folded("Every other metric in full", full))
    return parts
