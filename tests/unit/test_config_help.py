"""`--help` shows what each key means, examples first."""

import dataclasses
import re

import pytest

from launch.sweeps.config import SweepConfig
from trainer.config.compose import compose
from trainer.config.help import meaning_of


def _keys(kind: type, parents: tuple[str, ...] = ()) -> list[list[str]]:
    found = []
    for field in dataclasses.fields(kind):
        found.append([*parents, field.name])
        if dataclasses.is_dataclass(field.type):
            found += _keys(field.type, (*parents, field.name))
    return found


def test_every_key_of_the_schema_has_a_meaning_of_one_line() -> None:
    keys = _keys(SweepConfig)
    assert ["trainer", "steps"] in keys and ["ema", "decay"] in keys and ["launch", "slots"] in keys
    for path in keys:
        meaning = meaning_of(SweepConfig, path)
        assert meaning and "\n" not in meaning, path
    assert meaning_of(SweepConfig, ["trainer", "steps"]) == "Optimizer steps of the whole run, at least 1."


def test_a_key_that_a_group_declares_again_has_the_meaning_of_the_group() -> None:
    assert meaning_of(SweepConfig, ["ema", "mode"]).startswith("`full_tensor`, `local_shard`, or `auto`")


def test_help_shows_examples_and_then_each_key_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compose(["experiment=digits_flow", "trainer.steps=7", "--help"])
    shown = capsys.readouterr().out
    assert shown.index("Examples:") < shown.index("Groups, chosen by") < shown.index("Keys, set by")
    for line in (
        r"  steps: 7 +# Optimizer steps of the whole run, at least 1\.",
        r"  depth: 4 +# blocks",  # of the chosen model
        r"  sample_count: 100 +# images drawn for the grid of samples",
    ):
        assert re.search(f"^{line}$", shown, re.MULTILINE), line
