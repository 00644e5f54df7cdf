"""Tables on a terminal, or as text where there is none."""

import io
import sys
from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, TextIO

from trainer.report.text.table import EMPTY_CELL, Table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

PAGE_WIDTH = 120
"""Columns of text outside a terminal, which has a width of its own. A table that needs more gets more."""
MIN_HEAD = 12
"""Characters up to which a head stays on one line over a narrower column."""


def to_rich(table: Table, room: int, *, narrow: bool) -> "RichTable":
    """For a terminal: the winner in bold green with an arrow, which also tells it without colours.

    Columns that say nothing of any line are left out.

    Args:
        table: What to draw.
        room: Characters in a line. Words break at blanks to fit.
        narrow: Whether numbers break as well where that is not enough; else the table is wider.
    """
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    columns = [number for number in range(len(table.headers)) if number not in table.file_only_columns]
    columns = [n for n in columns if n == 0 or any(row.cells[n] != EMPTY_CELL for row in table.lines)]
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1), show_edge=False)
    texts = [[row.cells[n] for n in columns] for row in table.lines]
    again = [
        place > 0 and cells[: table.group_columns] == texts[place - 1][: table.group_columns]
        for place, cells in enumerate(texts)
    ]
    if table.group_columns:
        texts = [
            [""] * table.group_columns + cells[table.group_columns :] if same else cells
            for same, cells in zip(again, texts, strict=True)
        ]
    if any(row.marked for row in table.lines):
        marks = ["> " if row.marked else "  " for row in table.lines]
        texts = [[mark + cells[0], *cells[1:]] for mark, cells in zip(marks, texts, strict=True)]
    words = [all(isinstance(row.keys[n], str) for row in table.lines) for n in columns]
    wide = [max(map(len, told)) for told in zip(*texts, strict=True)]
    heads = [
        wrap(table.headers[n], max(MIN_HEAD, width), break_long_words=False)
        for n, width in zip(columns, wide, strict=True)
    ]
    told = [[*head, *own] for head, own in zip(heads, zip(*texts, strict=True), strict=True)]
    widths = _widths(told, words, room - 2 * (len(columns) - 1), narrow=narrow)
    for place, head in enumerate(heads):
        # Text, not str: rich would read square brackets in a name as markup.
        drawn.add_column(
            Text("\n".join(head)),
            justify="left" if words[place] or place == 0 else "right",
            overflow="fold",
            width=widths[place] if widths else None,
        )
    for place, (row, cells) in enumerate(zip(table.lines, texts, strict=True)):
        if place and table.group_columns and not again[place]:
            drawn.add_section()
        drawn.add_row(*map(Text, cells), style="bold green" if row.marked else "")
    return drawn


def _widths(
    told: Sequence[Sequence[str]], words: Sequence[bool], room: int, *, narrow: bool
) -> list[int] | None:
    """A width for each column: that of its longest text, or less for the widest ones of words until all fit.

    Where that is not enough, numbers are narrowed as well, or nothing is and the table is wider. None where not even
    single words fit side by side. Rich itself would narrow numbers before words.
    """
    whole = [max(map(len, texts)) for texts in told]
    widths = list(whole)
    least = [max((len(word) for text in texts for word in text.split()), default=1) for texts in told]
    for may_break in (words, [narrow] * len(told)):
        while sum(widths) > room:
            wider = [n for n, width in enumerate(widths) if may_break[n] and width > least[n]]
            if not wider:
                break
            widths[max(wider, key=widths.__getitem__)] -= 1
    if sum(widths) <= room:
        return widths
    return None if narrow else whole


def print_tables(tables: Sequence[Table], stream: TextIO | None = None) -> None:
    """Print tables, each under its headline and above its notes; outside a terminal they are as wide as they need."""
    from rich.console import Console
    from rich.text import Text

    stream = stream or sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        # An ASCII terminal shows ± as ?, and does not end the program.
        stream.reconfigure(errors="replace")
    console = Console(file=stream, width=None if stream.isatty() else PAGE_WIDTH)
    for table in tables:
        console.print(Text(table.title, style="bold"))
        if table.headline:
            console.print(Text(table.headline))
        if table.lines:
            _print_lines(console, table)
        for note in table.notes:
            console.print(Text(note, style="dim"))
        console.print()


def _print_lines(console: "Console", table: Table) -> None:
    drawn = to_rich(table, console.width, narrow=console.is_terminal)
    page = console.width
    if not console.is_terminal:
        console.width = max(page, sum(column.width or 0 for column in drawn.columns) + 2 * len(drawn.columns))
    console.print(drawn)
    console.width = page
