"""Hostile names reach neither the terminal nor a renderer of Markdown nor a spreadsheet as more than text."""

import csv
import io

import pytest

from trainer.distributed.torchrun import complain
from trainer.errors import ConfigError
from trainer.report.text.table import Line, Table, to_markdown
from trainer.report.text.terminal import print_tables
from trainer.shell.printable import csv_cell, markdown_cell, print_text, printable

HOSTILE = "a\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\r\x08"


def is_harmless(text: str) -> bool:
    return all(character.isprintable() or character in "\n\t" for character in text)


@pytest.mark.parametrize(
    "character", [*map(chr, range(9)), "\x0b", "\x1b", "\x7f", "\x85", "\x9b", "\u2028", "\u202e"]
)
def test_a_control_character_becomes_its_escape(character):
    assert is_harmless(printable(f"a{character}b")) and printable(f"a{character}b").startswith("a\\")


def test_ordinary_text_stays():
    text = "größe 日本 — ± ‖x‖\n\t|"
    assert printable(text) == text


def test_no_output_has_control_characters(capsys):
    table = Table(
        metric="loss",
        title=HOSTILE,
        headline=HOSTILE,
        headers=["weights", HOSTILE],
        lines=[Line([HOSTILE, "1"], [HOSTILE, 1.0])],
        notes=[HOSTILE],
    )
    print_tables([table])
    print_text(HOSTILE)
    complain(ConfigError(f"{HOSTILE}\nnext: {HOSTILE}"), rank=0)
    out, err = capsys.readouterr()
    assert is_harmless(out) and is_harmless(err) and err.count("\n") == 1
    assert is_harmless(to_markdown(table))


def test_a_cell_of_markdown_is_text_only():
    cell = markdown_cell("<img src=x onerror=alert(1)> | [x](javascript:alert) `a`\n| new row")
    assert "<" not in cell and "](" not in cell and "\n" not in cell
    assert cell.count("|") == cell.count("\\|") == 2


@pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1"])
def test_a_spreadsheet_sees_no_formula(text):
    file = io.StringIO()
    csv.writer(file).writerow([csv_cell(text), csv_cell(-1.5), csv_cell("0.9")])
    assert next(csv.reader(io.StringIO(file.getvalue()))) == ["'" + text, "-1.5", "0.9"]
