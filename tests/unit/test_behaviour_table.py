"""The table of ema/BEHAVIOUR.md cannot rot: what it names exists, and every test against a peer is in it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEST_ID = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def tables() -> list[list[list[str]]]:
    """Rows of cells, headings left out, table by table; a table ends at a line that is not a row."""
    found: list[list[list[str]]] = [[]]
    for line in (ROOT / "ema" / "BEHAVIOUR.md").read_text().splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [table[2:] for table in found if table]


def functions(path: Path) -> set[str]:
    """Names of the tests in a file, which is read and not imported."""
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


REFERENCES, *BEHAVIOURS = tables()
ROWS = [row for table in BEHAVIOURS for row in table]


def test_the_tables_are_found() -> None:
    assert len(BEHAVIOURS) == 6 and len(ROWS) > 40 and len(REFERENCES) >= 10


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_a_row_names_a_behaviour_a_test_of_ours_and_a_peer(row: list[str]) -> None:
    behaviour, ours, theirs = row
    assert behaviour and not TEST_ID.search(behaviour)
    assert TEST_ID.findall(ours) and not any("peers" in path for path, _ in TEST_ID.findall(ours))
    cited = any(name in theirs for name, _ in REFERENCES)
    assert TEST_ID.search(theirs) or cited or theirs.startswith("none"), theirs


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_every_test_that_a_row_names_exists(row: list[str]) -> None:
    for path, name in TEST_ID.findall(" ".join(row)):
        assert (ROOT / path).is_file(), path
        assert name.startswith("test_") and name in functions(ROOT / path), f"{path}::{name}"


def test_every_test_against_a_peer_is_in_the_table() -> None:
    named = set(TEST_ID.findall((ROOT / "ema" / "BEHAVIOUR.md").read_text()))
    for path in sorted((ROOT / "tests" / "peers").glob("test_*.py")):
        short = path.relative_to(ROOT).as_posix()
        for name in functions(path):
            assert not name.startswith("test_") or (short, name) in named, f"{short}::{name}"
