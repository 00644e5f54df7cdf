"""The report of a run, made from its directory alone, without torch: tables, pictures and one page."""

from dataclasses import dataclass
from pathlib import Path

from trainer.files import write_atomically
from trainer.report.read import Run, read_run
from trainer.report.table import Row, rows_of, table_of, to_csv, to_markdown

__all__ = ["ReportPaths", "read_run", "write_report"]


@dataclass(frozen=True)
class ReportPaths:
    """The files of a report; a picture is None where there was nothing to draw."""

    page: Path
    markdown: Path
    csv: Path
    curves: Path | None
    loss_over_decay: Path | None
    divergence: Path | None


def write_report(run_dir: Path) -> ReportPaths:
    """Write `run_dir/report`: `index.html`, `table.md`, `table.csv` and the pictures, each file atomically.

    It may be called again at any time, also while the run goes on. Other PNG files in that folder (grids of generated
    images) are shown on the page as well.

    Args:
        run_dir: A run directory.

    Raises:
        ConfigError: not a run directory, or a damaged file in it.
    """
    run = read_run(run_dir)
    folder = run_dir / "report"
    rows = [row for metric in run.metrics for row in rows_of(run, metric)]
    markdown, table = folder / "table.md", folder / "table.csv"
    write_atomically(
        markdown,
        "\n".join(to_markdown(table_of(run, metric)) for metric in run.metrics or [run.primary_metric]),
    )
    write_atomically(table, to_csv(rows, Row))
    curves, over_decay, divergence = _draw(run, folder)
    from trainer.report.page import run_page

    page = folder / "index.html"
    write_atomically(page, run_page(run, folder))
    return ReportPaths(page, markdown, table, curves, over_decay, divergence)


def _draw(run: Run, folder: Path) -> tuple[Path | None, Path | None, Path | None]:
    # Imported here: matplotlib takes longer to import than a table to make.
    from trainer.report import plots

    for metric in run.metrics:
        if metric != run.primary_metric:
            plots.draw_curves(run, metric, folder / f"curves_{metric}.png")
    curves, over_decay, divergence = (
        folder / f"{name}.png" for name in ("curves", "loss_over_decay", "divergence")
    )
    return (
        curves if plots.draw_curves(run, run.primary_metric, curves) else None,
        over_decay if plots.draw_over_decay(run, run.primary_metric, over_decay) else None,
        divergence if plots.draw_divergence(run, divergence) else None,
    )
