"""What a run's frozen configuration keeps, what it is refused for, and how a resumed run changes it."""

import dataclasses
from pathlib import Path

import pytest

from tests.makers import composed, freeze
from trainer.config.compose import compose, to_config
from trainer.config.frozen import resume_config, thaw
from trainer.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def frozen() -> str:
    """Of the defaults, as an earlier run with targets of its own would have left it."""
    return freeze(composed("allow_targets=[old.]"))


def test_a_named_average_is_changed_or_made_in_a_resumed_run():
    argv = ["resume=somewhere", "ema.averages.slow.decay=0.5"]
    for before, named in (
        ("ema.averages={slow:{gamma:3}}", {"gamma": 3, "decay": 0.5}),
        ("ema.averages=null", {"decay": 0.5}),
    ):
        cfg = resume_config(freeze(composed(before)), *compose(argv))
        assert to_config(cfg).ema.averages == {"slow": named}


def test_the_frozen_text_is_equal_for_equal_science(frozen):
    assert frozen == freeze(composed("run_dir=b", "resume=c"))
    assert frozen != freeze(composed("seed=1"))
    assert "hydra" not in frozen and "${" not in frozen


@pytest.mark.parametrize("name", ["run_1_rank", "run_2_ranks"])
def test_the_frozen_text_of_the_first_release_is_that_of_the_same_run_today(name):
    text = (ROOT / "tests/fixtures/first_release" / name / "config.yaml").read_text()
    assert freeze(thaw(text)) == text


@pytest.mark.parametrize(
    "text", ["experiment: ${oc.env:HOME}\n", "model:\n  a: [1, {b: 'x ${now:%Y}'}]\n", "data:\n  ${x}: 1\n"]
)
def test_a_frozen_configuration_with_an_interpolation_is_refused(text):
    with pytest.raises(ConfigError, match="must not have"):
        thaw(text)


def test_a_frozen_configuration_can_run_no_code_and_grant_no_target(tmp_path):
    hit = tmp_path / "hit"
    with pytest.raises(ConfigError):
        thaw(f"experiment: !!python/object/apply:os.mkdir ['{hit}']\n")
    assert not hit.exists()
    thawed = thaw("allow_targets: [os.]\nrun_dir: x\nresume: y\n")
    assert (thawed.allow_targets, thawed.run_dir, thawed.resume) == ([], None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: {steps: soon}", "config.yaml: trainer.steps: expected an integer, got 'soon'"),
        ("trainer: {stepz: 1}", "config.yaml: trainer.stepz: unknown key; did you mean trainer.steps?"),
        ("- 1", "config.yaml: expected keys and values"),
        ("a: b: c", "config.yaml: "),
    ],
)
def test_a_damaged_frozen_configuration_is_refused_by_name(text, message):
    with pytest.raises(ConfigError) as error:
        thaw(text)
    assert str(error.value).startswith(message)


def resumed(frozen: str, *argv: str):
    cfg, overrides = compose(["resume=somewhere", *argv])
    return to_config(resume_config(frozen, cfg, overrides))


def test_resuming_keeps_everything_that_is_not_named():
    frozen = freeze(composed("experiment=digits_flow", "seed=7", "model.depth=2"))
    config = resumed(frozen)
    assert dataclasses.replace(config, resume=None) == to_config(thaw(frozen))
    assert (config.experiment, config.seed, config.model["depth"]) == ("digits_flow", 7, 2)
    assert config.resume == "somewhere"


def test_resuming_replaces_a_key_alone_and_a_group_as_a_whole():
    frozen = freeze(
        composed("sharding=fsdp", "sharding.compile=true", "trainer.log_every=3", "optimizer=sgd")
    )
    config = resumed(frozen, "trainer.steps=2000", "sharding=hsdp", "optimizer=adamw")
    assert (config.trainer.steps, config.trainer.log_every) == (2000, 3)
    assert (config.sharding.strategy, config.sharding.compile) == ("hsdp", False)
    assert (config.optimizer.name, "momentum" in config.optimizer.args) == ("AdamW", False)


def test_one_decay_named_on_resume_replaces_a_bank():
    ema = resumed(freeze(composed("ema.decays=[0.9,0.99]")), "ema.decay=0.95").ema
    assert (ema.decays, ema.decay) == ([], 0.95)


def test_an_interpolation_named_on_resume_reads_the_resumed_run():
    frozen = freeze(composed("model.context=256"))
    config = resumed(frozen, "data.context=${model.context}", "+data.new.deep=1")
    assert (config.data["context"], config.data["new"]) == (256, {"deep": 1})


@pytest.mark.parametrize("argument", ["experiment=quickstart", "run_dir=x", "~model.rope_base"])
def test_overrides_without_a_meaning_on_resume_are_refused(argument, frozen):
    with pytest.raises(ConfigError, match="resume="):
        resumed(frozen, argument)


def test_targets_are_allowed_on_resume_by_the_new_command_line_only(frozen):
    assert resumed(frozen).allow_targets == []
    assert resumed(frozen, "allow_targets=[mine.]").allow_targets == ["mine."]
