"""One HTML page that needs no other file and no network: pictures inside, a few lines of script to sort its tables."""

import base64
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from html import escape
from pathlib import Path

from trainer.report.best_decay import optimum
from trainer.report.comparison import Comparison
from trainer.report.group import Group
from trainer.report.pictures.decay_plots import draw_heat_map, draw_over_decay
from trainer.report.pictures.plots import draw_comparison, draw_curves, draw_divergence
from trainer.report.runs import Run
from trainer.report.text.brief import brief
from trainer.report.text.table import Table, table_of
from trainer.report.verdicts import Row, rows_of

# The policy lets the page load nothing, so that a name in a config cannot make it.
_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
 max-width: 80rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.4rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.1rem; margin-top: 2rem; overflow-wrap: anywhere; }}
.lead {{ font-size: 1.1rem; }}
.note {{ color: #555; font-size: .9rem; }}
.scroll {{ overflow-x: auto; border: 1px solid #ddd; }}
.scroll:focus-visible {{ outline: 2px solid #0072B2; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem; }}
th, td {{ padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }}
td {{ white-space: nowrap; }}
th {{ vertical-align: bottom; min-width: 2.5rem; }}
th:first-child, td:first-child {{ text-align: left; position: sticky; left: 0; background: #fff; }}
th button {{ all: unset; cursor: pointer; font-weight: 600; }}
th button:focus-visible {{ outline: 2px solid #0072B2; outline-offset: 2px; }}
th[aria-sort=ascending] button::after {{ content: " \\25B2"; }}
th[aria-sort=descending] button::after {{ content: " \\25BC"; }}
tr.winner td {{ font-weight: 700; background: #e7f4ee; }}
tr.winner td:first-child::before {{ content: "\\2605  "; }}
p, figure {{ max-width: 62rem; }}
figure {{ margin: 1rem 0; }}
img {{ max-width: 100%; height: auto; }}
pre {{ background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .85rem; }}
summary {{ cursor: pointer; font-weight: 600; margin: .6rem 0; }}
</style>
</head>
<body>
"""

_TAIL = """<script>
"use strict";
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0];
  const up = head.getAttribute("aria-sort") !== "ascending", column = head.cellIndex;
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => row.cells[column].dataset.key;
  const compare = (a, b) => {
    const x = key(a), y = key(b);
    if ((x === "") !== (y === "")) return x === "" ? 1 : -1;
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return up ? order : -order;
  };
  body.append(...[...body.rows].sort(compare));
});
</script>
</body>
</html>
"""

CURVES = "Evaluation on the same samples: live weights and each average. Below: the paired gap with its 95 % interval."
OTHER_METRICS = "The other metrics of the same evaluations."
OVER_DECAY = (
    "The last evaluation over the length of the average, with the 95 % interval of each paired gap to live."
)
DIVERGENCE = "How far each average is from the live weights."
HEAT_MAP = "Evaluation over decay and step; a dot marks the best average of each step, hatching those worse than live."


def run_page(run: Run, folder: Path) -> str:
    """The page of one run, with the PNG files of `folder`."""
    parts = [f"<h1>{escape(run.name)}</h1>"]
    parts += map(html_table, brief(run))
    others = [html_table(table_of(run, metric)) for metric in run.metrics if metric != run.primary_metric]
    parts += [folded("Every other metric in full", others)] if others else []
    parts += _figures(run, folder)
    parts += ["<h2>What was run</h2>", _pre("Overrides", "\n".join(run.overrides) or "none", is_open=True)]
    for number, (typed, _) in enumerate(run.sessions, start=2):
        parts.append(_pre(f"Overrides of session {number}", "\n".join(typed) or "none", is_open=True))
    last = " of the last session" if run.sessions else ""
    parts.append(
        _pre(f"Configuration{last}", run.sessions[-1][1] if last else _text_of(run.path / "config.yaml"))
    )
    # The sessions' configurations are long, and told above.
    facts = {key: value for key, value in run.meta.items() if key != "resumed"}
    parts.append(_pre("Where and with what", json.dumps(facts, indent=2, default=str)))
    return page(run.name, parts)


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page; `parts` are HTML already."""
    return _HEAD.format(title=escape(title)) + "\n".join(parts) + "\n" + _TAIL


def html_table(table: Table) -> str:
    """A table whose columns sort by a click on their heads, with its title and notes."""
    heads = "".join(
        f'<th scope="col"><button type="button">{escape(header)}</button></th>' for header in table.headers
    )
    body = "\n".join(
        ('<tr class="winner">' if line.marked else "<tr>")
        + "".join(
            f"<td{_key(key)}>{escape(cell)}</td>" for cell, key in zip(line.cells, line.keys, strict=True)
        )
        + "</tr>"
        for line in table.lines
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    lead = f'<p class="lead">{escape(table.headline)}</p>\n' if table.headline else ""
    return (
        f'<h2>{escape(table.title)}</h2>\n{lead}<div class="scroll" role="region" tabindex="0" '
        f'aria-label="{escape(table.title)}"><table>\n<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>\n{notes}"
    )


def picture(path: Path, text: str) -> str:
    """A PNG file as part of the page."""
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f'<figure><img alt="{escape(text)}" src="data:image/png;base64,{content}">'
        f'<figcaption class="note">{escape(text)}</figcaption></figure>'
    )


def over_decay_caption(group: Group, metric: str) -> str:
    """`OVER_DECAY`, and where the optimum may lie."""
    best = optimum(group, rows_of(group, metric))
    return OVER_DECAY if best is None else f"{OVER_DECAY} {str(best).capitalize()} (95 %)."


def _figures(run: Run, folder: Path) -> list[str]:
    """The known pictures first, then whatever else the run put there (image grids)."""
    known = {
        "curves": CURVES,
        "other_metrics": OTHER_METRICS,
        "loss_over_decay": over_decay_caption(Group(run.name, [run]), run.primary_metric),
        "divergence": DIVERGENCE,
        "heat_map": HEAT_MAP,
    }
    found = {path.stem: path for path in sorted(folder.glob("*.png"))}
    shown = [picture(found.pop(stem), text) for stem, text in known.items() if stem in found]
    return shown + [picture(path, stem.replace("_", " ")) for stem, path in found.items()]


def _key(key: float | str | None) -> str:
    """What the column sorts by; missing numbers and NaN come last, in both directions."""
    text = "" if key is None or key != key else escape(str(key))
    return f' data-key="{text}"'


def folded(title: str, parts: Iterable[str], *, is_open: bool = False) -> str:
    """HTML that shows at a click on its title."""
    return (
        f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>\n"
        + "\n".join(parts)
        + "</details>"
    )


def _pre(title: str, text: str, *, is_open: bool = False) -> str:
    return folded(title, [f"<pre>{escape(text)}</pre>"], is_open=is_open)


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else "no config.yaml"


def comparison_figures(comparison: Comparison, folder: Path, number: int, max_groups: int) -> list[str]:
    """Draw a comparison into `folder`: all groups side by side, and the best ones over steps and decays.

    Args:
        comparison: What to draw.
        folder: Where the PNG files go.
        number: Of the comparison among several; the first one's files have no number.
        max_groups: Groups with pictures of their own.
    """
    metric, prefix = comparison.metric, f"{number}_" if number else ""
    best = comparison.ranked()[:max_groups]
    alone = len(comparison.groups) == 1
    parts = [f"<h2>Pictures: {escape(comparison.groups[0].with_unit(metric))}</h2>"]

    def add(name: str, text: str, draw: Callable[[Path], bool]) -> None:
        path = folder / f"{prefix}{name}.png"
        if draw(path):
            parts.append(picture(path, text))

    if not alone:
        text = "Mean of the last evaluations, with the standard deviation over seeds."
        add("comparison", text, partial(draw_comparison, comparison))
    drawn = [(comparison.groups[place], comparison.rows[place]) for place in best]
    text = over_decay_caption(drawn[0][0], metric) if alone else _optima_caption(drawn)
    add("loss_over_decay", text, partial(draw_over_decay, drawn, metric))
    if len(best) < len(comparison.groups):
        parts.append(f'<p class="note">Below: the {len(best)} best of {len(comparison.groups)} groups.</p>')
    for place, (group, _) in enumerate(drawn):
        end = "" if alone else f"_{place}"
        start = "" if alone else f"{group.name}: "
        add(f"curves{end}", start + CURVES, partial(draw_curves, group, metric))
        add(f"divergence{end}", start + DIVERGENCE, partial(draw_divergence, group))
        add(f"heat_map{end}", start + HEAT_MAP, partial(draw_heat_map, group, metric))
    return parts


def _optima_caption(drawn: Sequence[tuple[Group, Sequence[Row]]]) -> str:
    found = [(group.name, optimum(group, rows)) for group, rows in drawn]
    told = [f"{name}: {best} (95 %)." for name, best in found if best is not None]
    return " ".join([OVER_DECAY, *told])
