"""Make an HTML page that needs no other file: it contains its figures and a script that sorts tables.

The HTML is in `page.html`, as macros of jinja2.
"""

import base64
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from trainer.report.best_decay import optimum
from trainer.report.comparison import Comparison
from trainer.report.group import Group
from trainer.report.pictures.decay_plots import draw_heat_map, draw_over_decay
from trainer.report.pictures.plots import draw_comparison, draw_curves, draw_divergence
from trainer.report.pictures.setting_plot import draw_over_setting
from trainer.report.runs import Run
from trainer.report.text.brief import brief
from trainer.report.text.pair_table import pair_table
from trainer.report.text.table import table_of
from trainer.report.verdicts import Row, rows_of
from trainer.rundir.files import open_regular, read_text

_environment = Environment(
    loader=PackageLoader("trainer.report", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
html: Any = _environment.get_template("page.html").module
"""Macros of `page.html`; each returns a part of a page as escaped HTML."""

CURVES = "Evaluation on the same samples: live weights and each average. Below: the paired gap with its 95 % interval."
OTHER_METRICS = "The other metrics of the same evaluations."
OVER_DECAY = (
    "The last evaluation over the length of the average, with the 95 % interval of each paired gap to live."
)
OVER_SETTING = "The last evaluation over the setting that differs, with the standard deviation over seeds."
DIVERGENCE = "How far each average is from the live weights."
HEAT_MAP = "Evaluation over decay and step; a dot marks the best average of each step, hatching those worse than live."


def run_page(run: Run, folder: Path, following: Sequence[Sequence[str]] = ()) -> str:
    """Make the page of a run, with the PNG files of `folder` and what may follow: blocks of a title and lines."""
    parts = [html.table(table) for table in (*brief(run), pair_table(run, run.primary_metric)) if table]
    parts += [
        html.folded_text(title.removesuffix(":"), "\n".join(lines), True) for title, *lines in following
    ]
    others = [html.table(table_of(run, metric)) for metric in run.metrics if metric != run.primary_metric]
    if others:
        parts.append(html.folded("Every other metric in full", others))
    parts += _run_figures(run, folder)
    parts.append(html.heading("What was run"))
    overrides = {"Overrides": run.overrides}
    overrides |= {f"Overrides of session {n}": own for n, (own, _) in enumerate(run.sessions, start=2)}
    parts += [html.folded_text(title, "\n".join(own) or "none", True) for title, own in overrides.items()]
    if run.sessions:
        parts.append(html.folded_text("Configuration of the last session", run.sessions[-1][1]))
    else:
        path = run.path / "config.yaml"
        text = read_text(path) if path.exists() else "no config.yaml"
        parts.append(html.folded_text("Configuration", text))
    # The long configurations of the sessions are left out here: the last one is above.
    facts = {key: value for key, value in run.meta.items() if key != "resumed"}
    parts.append(html.folded_text("Environment and metadata", json.dumps(facts, indent=2, default=str)))
    return str(html.page(run.name, run.name, parts))


def _figure(path: Path, caption: str) -> str:
    with open_regular(path) as file:
        return html.figure(base64.b64encode(file.read()).decode("ascii"), caption)


def _run_figures(run: Run, folder: Path) -> list[str]:
    """Return the standard figures, then all other PNG files (image grids)."""
    captions = {
        "curves": CURVES,
        "other_metrics": OTHER_METRICS,
        "loss_over_decay": _over_decay_caption(Group(run.name, [run]), run.primary_metric),
        "divergence": DIVERGENCE,
        "heat_map": HEAT_MAP,
    }
    paths = {path.stem: path for path in sorted(folder.glob("*.png"))}
    standard = [_figure(paths.pop(stem), text) for stem, text in captions.items() if stem in paths]
    return standard + [_figure(path, stem.replace("_", " ")) for stem, path in paths.items()]


def _over_decay_caption(group: Group, metric: str) -> str:
    best = optimum(group, rows_of(group, metric))
    return OVER_DECAY if best is None else f"{OVER_DECAY} {str(best).capitalize()} (95 %)."


def comparison_figures(comparison: Comparison, folder: Path, number: int, max_groups: int) -> list[str]:
    """Draw a comparison into `folder`, and return the parts of the page that show the figures.

    Args:
        comparison: Comparison to draw.
        folder: Directory of the PNG files.
        number: Index of the comparison on the page; from 1 on it is a prefix of the file names.
        max_groups: Most groups with figures of their own; the best groups are chosen.
    """
    metric, prefix = comparison.metric, f"{number}_" if number else ""
    best = comparison.ranked()[:max_groups]
    single = len(comparison.groups) == 1
    parts = [html.heading(f"Figures: {comparison.groups[0].with_unit(metric)}")]

    def add(name: str, caption: str, draw: Callable[[Path], bool]) -> None:
        path = folder / f"{prefix}{name}.png"
        if draw(path):
            parts.append(_figure(path, caption))

    if not single:
        caption = "Mean of the last evaluations, with the standard deviation over seeds."
        add("comparison", caption, partial(draw_comparison, comparison))
        add("loss_over_setting", OVER_SETTING, partial(draw_over_setting, comparison))
    drawn = [(comparison.groups[index], comparison.rows[index]) for index in best]
    caption = _over_decay_caption(drawn[0][0], metric) if single else _optima_caption(drawn)
    add("loss_over_decay", caption, partial(draw_over_decay, drawn, metric))
    if len(best) < len(comparison.groups):
        parts.append(html.paragraph(f"Below: the {len(best)} best of {len(comparison.groups)} groups."))
    for index, (group, _) in enumerate(drawn):
        suffix = "" if single else f"_{index}"
        start = "" if single else f"{group.name}: "
        add(f"curves{suffix}", start + CURVES, partial(draw_curves, group, metric))
        add(f"divergence{suffix}", start + DIVERGENCE, partial(draw_divergence, group))
        add(f"heat_map{suffix}", start + HEAT_MAP, partial(draw_heat_map, group, metric))
    return parts


def _optima_caption(drawn: Sequence[tuple[Group, Sequence[Row]]]) -> str:
    optima = [(group.name, optimum(group, rows)) for group, rows in drawn]
    sentences = [f"{name}: {best} (95 %)." for name, best in optima if best is not None]
    return " ".join([OVER_DECAY, *sentences])
