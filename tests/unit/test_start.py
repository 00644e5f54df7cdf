"""How a command starts: what it imports is set aside from the search for garbage, once, and nothing else changes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("before", "set_aside"),
    [("", True), ("sys.modules['torch'] = sys", False), ("gc.disable()", False)],
    ids=["a command", "a program that has torch already", "a program that collects no garbage"],
)
def test_imports_are_set_aside_in_a_command_and_nothing_is_touched_in_other_programs(
    before: str, set_aside: bool
) -> None:
    code = f"""
import gc, sys
from trainer.cli import importing
{before}
enabled = gc.isenabled()
try:
    with importing():
        within = gc.isenabled()
        raise ImportError
except ImportError:
    pass
assert gc.isenabled() == enabled
print(within == enabled, gc.get_freeze_count() > 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(not set_aside), str(set_aside)], done.stderr
