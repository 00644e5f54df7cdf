"""Write the report of a run from its directory, without torch: tables, figures and one page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.report.frames import frame
from trainer.report.group import Group
from trainer.report.runs import Run, read_run
from trainer.report.text.pair_table import full_tables
from trainer.report.text.race_table import race_table
from trainer.report.text.table import to_markdown
from trainer.report.verdicts import rows_of, to_csv
from trainer.rundir.files import check_own_folder, write_atomically

__all__ = ["ReportPaths", "frame", "read_run", "write_report", "write_report_of"]


@dataclass(frozen=True)
class ReportPaths:
    """Paths of the files of a report; None for a figure without data."""

    page: Path
    markdown: Path
    csv: Path
    curves: Path | None
    loss_over_decay: Path | None
    divergence: Path | None
    heat_map: Path | None


def write_report(run_dir: Path) -> ReportPaths:
    """Write `run_dir/report`: `index.html`, `table.md`, `table.csv` and the pictures, each file atomically.

    It may be called again at any time, also while the run trains. The page also shows all other PNG files in that
    folder, such as grids of generated images.

    Args:
        run_dir: A run directory.

    Raises:
        ConfigError: `run_dir` is not a run directory, a file in it is damaged, or its folder `report` is a link.
    """
    return write_report_of(read_run(run_dir))


def write_report_of(
    run: Run, following: Sequence[Sequence[str]] = (), allowed: Sequence[str] = ()
) -> ReportPaths:
    """Write the same report as `write_report`, from a run that `read_run` has read.

    Args:
        run: Run of the report.
        following: What may follow, for the page: blocks of a title and lines.
        allowed: Prefixes of `_target_` that the user allowed, for the page's command.
    """
    folder = run.path / "report"
    check_own_folder(folder)
    markdown, table = folder / "table.md", folder / "table.csv"
    tables = [*full_tables(run), *filter(None, [race_table(run, run.primary_metric)])]
    write_atomically(markdown, "\n".join(map(to_markdown, tables)))
    write_atomically(table, to_csv(row for metric in run.metrics for row in rows_of(run, metric)))
    drawn = _draw(run, folder)
    # Imported here, like the pictures, because the import of matplotlib takes longer than making a table.
    from trainer.report.page import run_page

    page = folder / "index.html"
    write_atomically(page, run_page(run, folder, drawn, following, allowed))
    names = ("curves", "loss_over_decay", "divergence", "heat_map")
    return ReportPaths(
        page, markdown, table, *(folder / f"{name}.png" if name in drawn else None for name in names)
    )


def _draw(run: Run, folder: Path) -> dict[str, str]:
    """Write the pictures of a run as PNG files, and return those with data as SVG by name."""
    from trainer.report.pictures import axis_plot, decay_plots, plots

    group, metric = Group(run.name, [run]), run.primary_metric
    others = [name for name in run.metrics if name != metric]
    rows = rows_of(group, metric)
    pictures: dict[str, Callable[[Path], str | None]] = {
        "curves": lambda path: plots.draw_curves(group, metric, path),
        "other_metrics": lambda path: plots.draw_metrics(group, others, path),
        "loss_over_decay": lambda path: decay_plots.draw_over_decay([(group, rows)], metric, path),
        "divergence": lambda path: plots.draw_divergence(group, path),
        "heat_map": lambda path: decay_plots.draw_heat_map(group, metric, path),
        "best_decay": lambda path: axis_plot.draw_best_decay(run, path),
    }
    drawn = {name: draw(folder / f"{name}.png") for name, draw in pictures.items()}
    return {name: svg for name, svg in drawn.items() if svg is not None}
