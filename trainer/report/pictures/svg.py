"""Write a figure as SVG for a page: small, in the colours of the page, with values under the pointer.

Every colour becomes `var(--NAME, #colour)`: the page sets the variables, once for a light and once for a dark screen. A
file that is saved from the page has no such variables and keeps the colours of the PNG files.
"""

import io
import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

MAX_TIPS = 20
"""Most values of a line under the pointer, to keep the picture small; the first and the last one are among them."""
TIP_AREA = 120
"""Area around a point that shows its value, in square points."""
TIP = "tip:"
"""Start of the address of a marker; the rest is the text under the pointer."""

_DROPPED = re.compile(r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", re.DOTALL)
_TAG = re.compile(r"<[^>]*>")
_GEOMETRY = re.compile(r'\b(?:d|x|y|transform)="[^"]*"')
_DECIMALS = re.compile(r"(\.\d)\d+")
_FONT_FAMILY = re.compile(r"font-family: [^;\"]*;? ?")
_REFERENCE = re.compile(r'(\bid="|href="#|url\(#)')
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_LINK = re.compile(rf"<a xlink:href=([\"']){TIP}(.*?)\1[^>]*>(.*?)</a>", re.DOTALL)
_SQUARE = re.compile(r'd="M (\S+) (\S+) (\S+) \S+ \S+ (\S+) ')
_LINES = re.compile(r"\n\s*")


def add_tips(axes: Axes, x: ArrayLike, y: ArrayLike, texts: Sequence[str]) -> None:
    """Add a text under the pointer at each point of an SVG picture; a PNG file does not show it.

    Args:
        axes: Panel of the points.
        x: `[n]`, positions of the points.
        y: `[n]`, their values.
        texts: `[n]`, text of each point. Of many points, MAX_TIPS get their text.
    """
    if not texts:
        return
    kept = np.unique(np.linspace(0, len(texts) - 1, MAX_TIPS).round().astype(int))
    places = np.asarray(x, dtype=float)[kept], np.asarray(y, dtype=float)[kept]
    points = axes.scatter(
        *places, s=TIP_AREA, marker="s", facecolor="none", edgecolor="none", linewidth=0, zorder=9
    )
    # matplotlib writes an address as a link around its marker; `to_svg` makes a title of it.
    points.set_urls([TIP + texts[index] for index in kept])


def to_svg(figure: Figure, name: str, variables: Mapping[str, str]) -> str:
    """Return a drawn figure as an SVG element that a page can contain beside others.

    Args:
        figure: The figure.
        name: Name of the picture, a prefix of all ids.
        variables: Name of the variable for each colour (`#rrggbb`, lower case) that the page sets.
    """
    content = io.StringIO()
    # Without a date, the same run gives the same page.
    figure.savefig(content, format="svg", metadata={"Date": None})
    text = content.getvalue()
    text = _DROPPED.sub("", text[text.index("<svg") :])
    # Only tags are changed: names of runs and averages are between them, and in the links of `add_tips`.
    text = _TAG.sub(lambda tag: _page_tag(tag[0], name, variables), text)
    text = _LINK.sub(lambda link: _tip(link[2], link[3]), text)
    text = text.replace("<svg ", '<svg font-family="system-ui, sans-serif" stroke-linejoin="round" ', 1)
    return _LINES.sub("\n", text).strip()


def _page_tag(tag: str, name: str, variables: Mapping[str, str]) -> str:
    """Return a tag with one decimal, ids of its own and colours of the page."""
    if tag.startswith("<a "):
        return tag
    tag = _GEOMETRY.sub(lambda found: _short_geometry(found[0]), tag)
    tag = _FONT_FAMILY.sub("", tag)
    tag = _REFERENCE.sub(rf"\g<1>{name}-", tag)
    return _COLOUR.sub(
        lambda colour: f"var(--{variables[colour[0]]}, {colour[0]})" if colour[0] in variables else colour[0],
        tag,
    )


def _short_geometry(attribute: str) -> str:
    """Return an attribute with coordinates, with one decimal and without letters that a path does not need."""
    short = _DECIMALS.sub(r"\1", " ".join(attribute.split()))
    # Points after "M x y" are lines; those of a curve need their letters.
    return short if "C" in short or "Q" in short else short.replace(" L ", " ")


def _tip(title: str, marker: str) -> str:
    """Return a square with a title in place of the marker of `add_tips`; nothing for a point outside the panel."""
    if (square := _SQUARE.search(marker)) is None:
        return ""
    left, bottom, right, top = map(float, square.groups())
    place = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}"'
    return f'<rect class="tip" pointer-events="all" fill="none" {place}><title>{title}</title></rect>'
