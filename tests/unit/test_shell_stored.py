"""Words of a record that may be printed as part of a command: none that is trusted because it was typed."""

import sys

import pytest

from trainer.config.trust import RUNS_CODE
from trainer.shell.commands import composition_flags
from trainer.shell.stored import may_be_printed

TRUSTED = [
    "model._target_=os.system",
    "data={_target_:os.system}",
    "allow_targets=[os.]",
    "trainer.on_checkpoint='rm {path}'",
    "ema.rule=os.system",
    "ema.averages={a:{rule:os.system}}",
    "hydra.searchpath=[/tmp]",
    "--config-dir",
    "-cd=/tmp",
    "launch.setup=[rm]",
    "data.path=${oc.env:HOME}",
    *(f"+model.{name}=true" for name in RUNS_CODE),
]


@pytest.mark.parametrize("word", TRUSTED)
def test_a_word_that_is_trusted_when_typed_is_not_repeated(
    word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["polyak", "seed=1"])
    assert not may_be_printed(["seed=1", word])
    monkeypatch.setattr(sys, "argv", ["polyak", word])
    assert may_be_printed(["seed=2", word]), "this process was started with it"


def test_other_overrides_are_repeated() -> None:
    words = [
        "experiment=quickstart",
        "optimizer.lr=0.1",
        "ema.decays=[0.9,0.99]",
        "init_from=hf:a/b",
        "ema=rules",
    ]
    assert may_be_printed(words)


def test_a_folder_of_configurations_is_repeated_only_if_it_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["polyak", "--config-dir", "mine"])
    assert may_be_printed(composition_flags(["polyak", "--config-dir", "mine"]))
    assert may_be_printed(composition_flags(["polyak", "--config-dir=mine"]))
    assert not may_be_printed(composition_flags(["polyak", "--config-dir", "of_a_stranger"]))
