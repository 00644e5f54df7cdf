"""Print tables on a terminal, or as plain text where there is no terminal."""

import io
import math
import sys
from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, TextIO

from trainer.report.format import EMPTY_CELL
from trainer.report.text.table import Table
from trainer.shell.printable import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

PAGE_WIDTH = 120
"""Characters of a line outside a terminal. Tables that need more get longer lines."""
LEFT_OUT = ("p (Holm)", "at step", "best", "is better")
"""Columns that a terminal leaves out, one after the other, where not every line fits; the headline has the p-value."""
BEST_NOTE = "(best):"
"""Beginning of a note on the column `best`."""
MIN_HEADER = 12
"""Most characters of a header line above a narrower column."""


def to_rich(table: Table, room: int, *, narrow: bool) -> "RichTable":
    """Convert a table for a terminal, without columns that are empty on all lines.

    The winner is bold and green, and has an arrow for terminals without colours.

    Args:
        table: Table to convert.
        room: Characters of a line. Columns of words are wrapped to fit.
        narrow: Whether columns of numbers are wrapped too if the table is still too wide; else it stays wider.
    """
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    columns = _shown_columns(table, room if narrow else math.inf)
    starts_group = _group_starts(table)
    texts = _cell_texts(table, columns, starts_group)
    widest = [max(map(len, cells)) for cells in zip(*texts, strict=True)]
    headers = [_header(table, n, width) for n, width in zip(columns, widest, strict=True)]
    is_text = [all(isinstance(line.keys[n], str) for line in table.lines) for n in columns]
    column_texts = [
        [*header, *cells] for header, cells in zip(headers, zip(*texts, strict=True), strict=True)
    ]
    widths = _column_widths(column_texts, is_text, room - 2 * (len(columns) - 1), narrow=narrow)
    result = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1), show_edge=False)
    for index, header in enumerate(headers):
        # rich would read square brackets in a str as markup, but not in a Text.
        result.add_column(
            Text(printable("\n".join(header))),
            justify="left" if is_text[index] or index == 0 else "right",
            overflow="fold",
            width=widths[index] if widths else None,
        )
    for index, (line, cells) in enumerate(zip(table.lines, texts, strict=True)):
        if index and table.group_columns and starts_group[index]:
            result.add_section()
        result.add_row(*(Text(printable(cell)) for cell in cells), style="bold green" if line.marked else "")
    return result


def _shown_columns(table: Table, room: float) -> list[int]:
    """Return the columns with a content, without as many of LEFT_OUT as make all cells fit into `room` characters."""
    columns = [n for n in range(len(table.headers)) if n not in table.file_only_columns]
    kept = [n for n in columns if n == 0 or any(line.cells[n] != EMPTY_CELL for line in table.lines)]
    for header in LEFT_OUT:
        widths = (max(len(text) for text in (*_header(table, n), *_cells(table, n))) for n in kept)
        # Two characters mark the winner.
        if 2 + sum(widths) + 2 * (len(kept) - 1) <= room:
            break
        kept = [n for n in kept if table.headers[n] != header]
    return kept


def _cells(table: Table, column: int) -> list[str]:
    return [line.cells[column] for line in table.lines]


def _header(table: Table, column: int, widest: int | None = None) -> list[str]:
    """Return the lines of a header above cells of at most `widest` characters; None is the longest cell."""
    widest = max(map(len, _cells(table, column)), default=0) if widest is None else widest
    return wrap(table.headers[column], max(MIN_HEADER, widest), break_long_words=False)


def _shown_notes(table: Table, room: float) -> list[str]:
    """Return the notes of a table without those on columns that were left out, which are named instead."""
    left_out = [n for n in _shown_columns(table, math.inf) if n not in _shown_columns(table, room)]
    if not left_out:
        return table.notes
    names = [table.headers[n] for n in left_out]
    notes = [note for note in table.notes if not ("best" in names and note.startswith(BEST_NOTE))]
    return [*notes, f"Too wide for this terminal, and in the report: {', '.join(names)}."]


def _group_starts(table: Table) -> list[bool]:
    """Return for each line whether its group columns differ from those of the line above."""
    groups = [line.cells[: table.group_columns] for line in table.lines]
    return [index == 0 or group != groups[index - 1] for index, group in enumerate(groups)]


def _cell_texts(table: Table, columns: Sequence[int], starts_group: Sequence[bool]) -> list[list[str]]:
    """Return the cells of `columns` for each line, with an arrow at the winner.

    Texts that name a group are only on the first line of the group.
    """
    has_winner = any(line.marked for line in table.lines)
    texts = []
    for line, is_first in zip(table.lines, starts_group, strict=True):
        cells = ["" if n < table.group_columns and not is_first else line.cells[n] for n in columns]
        if has_winner:
            cells[0] = ("> " if line.marked else "  ") + cells[0]
        texts.append(cells)
    return texts


def _column_widths(
    texts: Sequence[Sequence[str]], is_text: Sequence[bool], room: int, *, narrow: bool
) -> list[int] | None:
    """Return a width for each column: that of its longest text, or less until all columns fit.

    Columns of words shrink first, the widest of them first; rich alone would shrink numbers before words. If that is
    not enough, columns of numbers shrink too (`narrow`), or no column shrinks and the table is wider.

    Returns:
        None if the columns do not fit even with one word on each line.
    """
    longest = [max(map(len, column)) for column in texts]
    widths = list(longest)
    least = [max((len(word) for text in column for word in text.split()), default=1) for column in texts]
    for may_shrink in (is_text, [narrow] * len(texts)):
        while sum(widths) > room:
            wider = [n for n, width in enumerate(widths) if may_shrink[n] and width > least[n]]
            if not wider:
                break
            widths[max(wider, key=widths.__getitem__)] -= 1
    if sum(widths) <= room:
        return widths
    return None if narrow else longest


def print_tables(tables: Sequence[Table], stream: TextIO | None = None) -> None:
    """Print each table below its title and headline and above its notes."""
    from rich.console import Console
    from rich.text import Text

    stream = stream or sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        # An ASCII terminal shows ± as ?, instead of failing.
        stream.reconfigure(errors="replace")
    console = Console(file=stream, width=None if stream.isatty() else PAGE_WIDTH)
    for table in tables:
        console.print(Text(printable(table.title), style="bold"))
        if table.headline:
            console.print(Text(printable(table.headline)))
        if table.lines:
            _print_lines(console, table)
        for note in _shown_notes(table, console.width if console.is_terminal else math.inf):
            console.print(Text(printable(note), style="dim"))
        console.print()


def _print_lines(console: "Console", table: Table) -> None:
    result = to_rich(table, console.width, narrow=console.is_terminal)
    width = console.width
    if not console.is_terminal:
        needed = sum(column.width or 0 for column in result.columns) + 2 * len(result.columns)
        console.width = max(width, needed)
    console.print(result)
    console.width = width
