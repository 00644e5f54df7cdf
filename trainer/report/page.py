"""Make an HTML page that needs no other file: the answer first, then tables, figures and what was run.

The HTML is in `page.html`, as macros of jinja2.
"""

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from trainer.report.best_decay import optimum
from trainer.report.comparison import Comparison, combine
from trainer.report.first_screen import commands_of, first_screen
from trainer.report.format import display_name
from trainer.report.group import Group
from trainer.report.pictures.decay_plots import draw_heat_map, draw_over_decay
from trainer.report.pictures.plots import draw_comparison, draw_curves, draw_divergence
from trainer.report.pictures.setting_plot import draw_over_setting
from trainer.report.pictures.style import VARIABLES, line_style
from trainer.report.runs import Run
from trainer.report.text.brief import brief
from trainer.report.text.pair_table import pair_table
from trainer.report.text.race_table import race_table
from trainer.report.text.table import Table, table_of
from trainer.report.verdicts import Row, rows_of
from trainer.rundir.files import open_regular, read_text
from trainer.rundir.keys import LIVE, raced

_environment = Environment(
    loader=PackageLoader("trainer.report", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
html: Any = _environment.get_template("page.html").module
"""Macros of `page.html`; each returns a part of a page as escaped HTML."""

CURVES = "Evaluation on the same samples: live weights and each average. Below: the paired gap with its 95 % interval."
RACED = "An average that a race eliminated at a step has no value there."
OTHER_METRICS = "The other metrics of the same evaluations."
OVER_DECAY = "The last evaluation over the length of the average. Below: the paired gap to live with its 95 % interval."
OVER_SETTING = "The last evaluation over the setting that differs, with the standard deviation over seeds."
DIVERGENCE = "How far each average is from the live weights."
HEAT_MAP = "Evaluation over decay and step; a dot marks the best average of each step, hatching those worse than live."
BEST_DECAY = (
    "The horizon of the best decay at each evaluation, made from the averages; dotted lines are theirs."
)
MAIN = ("loss_over_decay", "curves")
"""Pictures that may be beside the answer; the first that was drawn is."""
WINNER_NOTE = "\u2605: the winner."
BEST_NOTE = "(best): the best value of all weights and steps."
SIGN_NOTE = "live - EMA: the average is better above 0 if lower is better, and below 0 if higher is better."
_NAMESPACES = re.compile(r' xmlns(:xlink)?="[^"]*"')


def run_page(
    run: Run,
    folder: Path,
    pictures: Mapping[str, str],
    following: Sequence[Sequence[str]] = (),
    allowed: Sequence[str] = (),
) -> str:
    """Make the page of a run.

    Args:
        run: Run of the page.
        folder: Folder of its report; PNG files there without a picture of that name (image grids) are shown, too.
        pictures: SVG pictures by name.
        following: What may follow: blocks of a title and lines.
        allowed: Prefixes of `_target_` that the user allowed, for the command that exports.
    """
    comparison = combine([run], run.primary_metric)
    figures = _run_figures(run, folder, pictures)
    colours = chips(run.averages)
    parts = []
    if comparison is not None:
        main = next((figures.pop(name) for name in MAIN if name in figures), Markup())
        parts.append(html.answer(first_screen(comparison, commands_of(comparison, allowed)), main))
    primary, *others = brief(run)
    parts.append(table_part(primary, colours, with_headline=comparison is None))
    parts += [table_part(table, colours) for table in others]
    parts += [
        html.folded_text(title.removesuffix(":"), "\n".join(lines), True) for title, *lines in following
    ]
    more = (make(run, run.primary_metric) for make in (pair_table, race_table))
    parts += [table_part(table, colours) for table in more if table is not None]
    full = [
        table_part(table_of(run, metric), colours) for metric in run.metrics if metric != run.primary_metric
    ]
    if full:
        parts.append(html.folded("Every other metric in full", full))
    parts.append(html.figures(figures.values()))
    parts += _what_was_run(run)
    return str(html.page(run.name, run.name, parts))


def _what_was_run(run: Run) -> list[Markup]:
    """Return the parts of the page with the overrides, the configuration and the circumstances."""
    parts = [html.heading("What was run")]
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
    return parts


def chips(averages: Iterable[str]) -> dict[str, str]:
    """Return the variable of the colour of all weights, by their names and by those that a table shows."""
    names = list(averages)
    colours = {name: VARIABLES[line_style(name, names)["color"]] for name in (LIVE, *names)}
    return colours | {display_name(name): colour for name, colour in colours.items()}


def table_part(table: Table, colours: Mapping[str, str], *, with_headline: bool = True) -> Markup:
    """Return a table with the colours of its weights, and notes on its marks.

    Args:
        table: Table to show.
        colours: Result of `chips`.
        with_headline: Whether its headline is shown; the answer of a page has the same text.
    """
    notes = [WINNER_NOTE] if any(line.marked for line in table.lines) else []
    has_best = any(cell.endswith("(best)") for line in table.lines for cell in line.cells)
    if has_best and not any(note.startswith("(best):") for note in table.notes):
        notes.append(BEST_NOTE)
    if "is better" in table.headers:
        notes.append(SIGN_NOTE)
    return Markup(html.table(table, colours, notes, with_headline))


def _picture(svg: str, name: str, caption: str) -> Markup:
    # A page needs no namespaces, and then it contains no address at all.
    return Markup(html.picture(_NAMESPACES.sub("", svg, count=2), name, caption))


def _image(path: Path, caption: str) -> Markup:
    with open_regular(path) as file:
        return Markup(html.image(base64.b64encode(file.read()).decode("ascii"), caption))


def _run_figures(run: Run, folder: Path, pictures: Mapping[str, str]) -> dict[str, Markup]:
    """Return the parts of the page that show the pictures by name, then those of all other PNG files."""
    captions = {
        "curves": f"{CURVES} {RACED}" if any(raced(run.columns)) else CURVES,
        "other_metrics": OTHER_METRICS,
        "loss_over_decay": _over_decay_caption(Group(run.name, [run]), run.primary_metric),
        "divergence": DIVERGENCE,
        "heat_map": HEAT_MAP,
        "best_decay": BEST_DECAY,
    }
    figures = {
        name: _picture(pictures[name], name, text) for name, text in captions.items() if name in pictures
    }
    others = [path for path in sorted(folder.glob("*.png")) if path.stem not in captions]
    return figures | {path.stem: _image(path, path.stem.replace("_", " ")) for path in others}


def _over_decay_caption(group: Group, metric: str) -> str:
    best = optimum(group, rows_of(group, metric))
    return OVER_DECAY if best is None else f"{OVER_DECAY} {str(best).capitalize()} (95 %)."


def comparison_figures(
    comparison: Comparison, folder: Path, number: int, max_groups: int, averages: Sequence[str]
) -> tuple[Markup, list[Markup]]:
    """Draw a comparison into `folder`; return the figure beside the answer, and parts of the page with the others.

    Args:
        comparison: Comparison to draw.
        folder: Directory of the PNG files.
        number: Index of the comparison on the page; from 1 on it is a prefix of the file names.
        max_groups: Most groups with figures of their own; the best groups are chosen.
        averages: All averages of the page, which share the colours.
    """
    metric, prefix = comparison.metric, f"{number}_" if number else ""
    best = comparison.ranked()[:max_groups]
    single = len(comparison.groups) == 1
    drawn = [(comparison.groups[index], comparison.rows[index]) for index in best]
    figures: dict[str, Markup] = {}

    def path(name: str) -> Path:
        return folder / f"{prefix}{name}.png"

    def add(name: str, caption: str, svg: str | None) -> None:
        if svg is not None:
            figures[name] = _picture(svg, path(name).stem, caption)

    caption = _over_decay_caption(drawn[0][0], metric) if single else _optima_caption(drawn)
    add("loss_over_decay", caption, draw_over_decay(drawn, metric, path("loss_over_decay"), averages))
    if not single:
        caption = "Mean of the last evaluations, with the standard deviation over seeds."
        add("comparison", caption, draw_comparison(comparison, path("comparison"), averages))
        over_setting = draw_over_setting(comparison, path("loss_over_setting"), averages)
        add("loss_over_setting", OVER_SETTING, over_setting)
    for index, (group, _) in enumerate(drawn):
        suffix = "" if single else f"_{index}"
        start = "" if single else f"{group.name}: "
        curves, divergence, heat_map = (f"{name}{suffix}" for name in ("curves", "divergence", "heat_map"))
        add(curves, start + CURVES, draw_curves(group, metric, path(curves), averages))
        add(divergence, start + DIVERGENCE, draw_divergence(group, path(divergence), averages))
        add(heat_map, start + HEAT_MAP, draw_heat_map(group, metric, path(heat_map)))
    beside = next((name for name in (*MAIN, "curves_0", "comparison") if name in figures), None)
    main = Markup() if beside is None else figures.pop(beside)
    parts = [html.heading(f"Figures: {comparison.groups[0].with_unit(metric)}")]
    if len(best) < len(comparison.groups):
        text = f"Curves of the {len(best)} best of {len(comparison.groups)} groups."
        parts.append(html.paragraph(text))
    return main, [*parts, html.figures(figures.values())]


def _optima_caption(drawn: Sequence[tuple[Group, Sequence[Row]]]) -> str:
    optima = [(group.name, optimum(group, rows)) for group, rows in drawn]
    sentences = [f"{name}: {best} (95 %)." for name, best in optima if best is not None]
    return " ".join([OVER_DECAY, *sentences])
