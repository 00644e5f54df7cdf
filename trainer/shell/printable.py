"""Text from files of other people, made safe for a terminal, for Markdown and for a spreadsheet."""

import html
import re
import sys
from textwrap import wrap

_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Control characters other than tab and line feed; characters that end a line or change the direction of text."""

_MARKUP = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)")
"""Beginnings of HTML tags and entities."""


def printable(text: object) -> str:
    """Return the text with its control characters as escapes, so a terminal does not obey them."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def one_line(text: object) -> str:
    """Return the text as `printable` does, on one line."""
    return " ".join(printable(text).split("\n"))


def wrapped(text: str, width: int) -> str:
    """Return the text on lines of at most `width` characters; one with a path or a command stays whole."""
    if "/" in text or " -m " in text:
        return text
    return "\n".join(wrap(text, width, subsequent_indent="  ", break_on_hyphens=False))


def print_text(*lines: object, error: bool = False) -> None:
    """Print `printable` lines on standard output, or on standard error."""
    print(*map(printable, lines), sep="\n", file=sys.stderr if error else sys.stdout, flush=True)


def markdown_cell(text: str) -> str:
    """Return a text as the content of a table's cell in Markdown: no HTML, no link and no further cell."""
    plain = _MARKUP.sub(lambda found: html.escape(found[0]), " ".join(printable(text).split()))
    return plain.replace("\\", "\\\\").replace("|", "\\|").replace("](", "]\\(").replace("`", "\\`")


def csv_cell(value: object) -> object:
    """Return a cell that a spreadsheet does not take for a formula; numbers stay as they are."""
    if not isinstance(value, str):
        return value
    plain = printable(value)
    return f"'{plain}" if plain.startswith(("=", "+", "-", "@", "\t")) else plain
