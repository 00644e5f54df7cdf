"""The attacks in their short form, as one command; `make chaos` is the long form."""

import json
import subprocess
import sys

import pytest

from tests.integration.commands import REPOSITORY, environment

TIMEOUT_S = 800
pytestmark = pytest.mark.timeout(TIMEOUT_S + 100)
ATTACKS = ("kills", "damage", "disk", "power", "signals", "fuzz")
"""All but those that have tests of their own: terminals, and hostile files."""


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, list[dict[str, object]]]:
    """Exit code, output and rows of the short form."""
    out = tmp_path_factory.mktemp("chaos") / "ledger.jsonl"
    words = [sys.executable, "-m", "tests.chaos", "--short", "--jobs", "2", f"--out={out}"]
    done = subprocess.run(
        words,
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return done.returncode, done.stdout + done.stderr, rows


def test_no_attack_of_the_short_form_comes_out_wrong(
    ledger: tuple[int, str, list[dict[str, object]]],
) -> None:
    code, printed, _ = ledger
    assert code == 0, printed


@pytest.mark.parametrize("attack", ATTACKS)
def test_each_attack_is_carried_out_and_counted(
    ledger: tuple[int, str, list[dict[str, object]]], attack: str
) -> None:
    rows = [row for row in ledger[2] if row["attack"] == attack]
    assert rows, ledger[1]
    if not any(row.get("attempted") for row in rows):
        assert attack in ("disk", "power"), ledger[1]
        pytest.skip(f"this machine cannot carry it out: {ledger[1]}")
