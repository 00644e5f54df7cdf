"""From command lines to configurations. Expected values are those of `trainer.config.schema` and `conf/`."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.makers import composed, freeze, refusal_of
from trainer.config.averages import settle_averages
from trainer.config.compose import compose, to_config
from trainer.config.frozen import resume_config, thaw
from trainer.config.validate import validate
from trainer.errors import ConfigError

ROOT = Path(__file__).parents[2]
EXPERIMENTS = {
    "quickstart": [],
    "digits_flow": [],
    "digits_guided": [],
    "digits_noise": [],
    "gpt2_124m": ["data.train_path=a.bin", "data.eval_path=b.bin"],
    "gpt_7b": ["data.train_path=a.bin", "data.eval_path=b.bin"],
    "dit_b": ["data.path=images"],
}


def refusal(*argv: str) -> str:
    return refusal_of(lambda: to_config(composed(*argv)))


def test_overrides_reach_the_dataclasses_with_their_types():
    cfg, overrides = compose(["trainer.steps=20", "optimizer.lr=3e-4", "sharding=fsdp", "data.context=64"])
    config = to_config(cfg)
    assert overrides == ["trainer.steps=20", "optimizer.lr=3e-4", "sharding=fsdp", "data.context=64"]
    assert (config.trainer.steps, config.optimizer.lr) == (20, 3e-4)
    assert config.sharding.strategy == "fsdp"
    assert type(config.data) is dict and config.data["context"] == 64


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_survives_freezing(name):
    cfg = composed(f"experiment={name}", *EXPERIMENTS[name])
    assert to_config(cfg).experiment == name
    assert to_config(thaw(freeze(cfg))) == to_config(cfg)


def test_an_experiment_wins_over_the_default_choices_and_the_command_line_over_both():
    config = to_config(composed("experiment=digits_flow", "schedule.warmup_steps=3", "ema=power"))
    assert config.model["_target_"].startswith("models.dit")
    assert config.schedule.warmup_steps == 3
    assert (config.ema.type, config.optimizer.args["weight_decay"]) == ("power", 0.0)


def test_interpolations_between_groups_are_resolved():
    config = to_config(
        composed("experiment=dit_b", "data.path=x", "model.in_channels=4", "model.image_size=16")
    )
    assert config.task["image_shape"] == [4, 16, 16]
    assert config.data["image_size"] == 16


def test_arguments_that_no_file_names_need_no_plus_where_a_signature_is_the_schema():
    config = to_config(composed("model.new=3", "task.new=a", "data.new=[1]", "optimizer.args.maximize=true"))
    assert (config.model["new"], config.task["new"], config.data["new"]) == (3, "a", [1])
    assert config.optimizer.args["maximize"] is True


def test_one_decay_on_the_command_line_replaces_a_bank():
    cfg, overrides = compose(["experiment=quickstart", "ema.decay=0.95"])
    assert to_config(cfg).ema.decays == [] and to_config(cfg).ema.decay == 0.95
    assert overrides == ["experiment=quickstart", "ema.decay=0.95"]  # as typed
    with pytest.raises(SystemExit) as left:  # a flag may follow
        compose(["experiment=quickstart", "ema.decay=0.95", "--cfg", "job"])
    assert left.value.code == 0
    assert to_config(composed("ema.decay=0.5", "ema.decays=[0.1,0.2]")).ema.decays == [0.1, 0.2]
    mixed = to_config(composed("ema=mixed", "ema.decay=0.95")).ema
    assert not mixed.averages and mixed.decay == 0.95


def test_named_averages_can_be_typed_changed_added_and_dropped():
    typed = composed("ema.averages={slow:{decay:0.9999,dtype:bfloat16},power:{type:power,gamma:6.94}}")
    assert to_config(typed).ema.averages == {
        "slow": {"decay": 0.9999, "dtype": "bfloat16"},
        "power": {"type": "power", "gamma": 6.94},
    }
    assert to_config(thaw(freeze(typed))) == to_config(typed)
    named = to_config(composed("ema=mixed")).ema.averages
    assert list(named) == ["short", "slow", "power"]
    changed = to_config(
        composed("ema=mixed", "ema.averages.slow.start_iter=9", "ema.averages.new={}", "~ema.averages.short")
    ).ema.averages
    assert changed == {"slow": named["slow"] | {"start_iter": 9}, "power": named["power"], "new": {}}
    beside = to_config(
        composed("experiment=quickstart", "ema.decay=0.5", "ema.averages.slow.type=warmup")
    ).ema
    assert (beside.decays, beside.averages, beside.decay) == ([], {"slow": {"type": "warmup"}}, 0.5)


@pytest.mark.parametrize("choice", sorted(path.stem for path in (ROOT / "conf" / "ema").glob("*.yaml")))
def test_every_choice_of_averages_is_valid(choice):
    config = to_config(composed(f"ema={choice}"))
    validate(config, 1)
    assert bool(settle_averages(config)) is (choice != "off")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("ema.deca=0.9", "ema.deca: unknown key; did you mean ema.decay?"),
        ("shardin=fsdp", "shardin: unknown key; did you mean sharding?"),
        ("steps=3", "steps: unknown key; did you mean trainer.steps?"),
        (
            "trainer.batch_size=8",
            "trainer.batch_size: unknown key; did you mean trainer.global_batch_size?",
        ),
        (
            "optimizer.weight_decay=0",
            "optimizer.weight_decay: unknown key; did you mean optimizer.args.weight_decay?",
        ),
        ("output_dir=x", "output_dir: unknown key; did you mean run_dir, or sweep_dir of a sweep?"),
        ("++ema.deca=0.9", "ema.deca: unknown key; did you mean ema.decay?"),
        ("sharding=fspd", "sharding: no choice 'fspd'; expected one of custom, ddp, fsdp, hsdp, none"),
        ("experiment=zz", "experiment: no choice 'zz'; expected one of byol, digits_flow,"),
        ("sharding=3", "sharding: expected the name of a choice, got 3; --help lists the choices"),
        ("ema=0.99", "ema: expected the name of a choice, got 0.99; ema.decay=0.99 sets the decay"),
        ("ema.decay=choice(0.9", "ema.decay: the bracket after choice is not closed"),
        ("run_dir=a(b", "run_dir: to give this text, type \"run_dir='a(b'\""),
        ("+sharding=fsdp", "sharding: has a choice already"),
        ("ema.decay=abc", "ema.decay: expected a number, got 'abc'"),
        ("~optimizer.args", "optimizer.args: cannot be removed; set another value: optimizer.args=VALUE"),
        ("trainer.steps=1e3", "trainer.steps: expected an integer, got '1e3'"),
        ("trainer.steps=2.0", "trainer.steps: expected an integer, got '2.0'"),
        ("trainer.steps=true", "trainer.steps: expected an integer, got 'true'"),
        ("trainer.steps=null", "trainer.steps: expected a value, got 'null'"),
        ("ema.enabled=maybe", "ema.enabled: expected true or false, got 'maybe'"),
        ("ema.decays=0.9", "ema.decays: expected a list, got '0.9'"),
        ("ema.averages=3", "ema.averages: expected keys and values, got '3'"),
        ("ema.averages={0.9:{}}", "ema.averages.0.9: "),
        ("ema=[]", "ema: expected the name of a choice, got none; --help lists the choices"),
        ("logger=[ ]", "logger: expected the name of a choice, got none"),
        ("optimizer=null", "optimizer: expected the name of a choice, got none"),
        ("~sharding", "sharding: expected the name of a choice, got none"),
        ("ema.averages={}", "ema.averages: {} changes nothing; ema.averages=null removes the averages"),
        ("ema.decays=[0.9,x]", "ema.decays[1]: expected a number, got 'x'"),
        ("trainer=3", "trainer: expected keys and values, got '3'"),
        ("ema.decay=0.9,0.99", "ema.decay: 0.9,0.99 is many values"),
        ("trainer.steps", "trainer.steps: expected key=value"),
        ("~trainer.steps", "trainer.steps: "),
        ("model.x=${nowhere}", "model.x: "),
        ("data=image_folder", "data.path: needs a value"),
        ("hydra.run.dir=here", "hydra.run.dir: of Hydra's keys only hydra.searchpath"),
        ("hydra.mode=MULTIRUN", "hydra.mode: of Hydra's keys only hydra.searchpath"),
        ("--config-dir=/nowhere", "Additional config directory '/nowhere' not found"),
    ],
)
def test_bad_input_is_one_line_that_names_the_key(argument, message):
    assert refusal(argument).startswith(message)


def test_of_several_values_the_one_that_is_no_choice_is_named():
    assert refusal("seed=1", "resume=null", "ema=0.99").startswith(
        "ema: expected the name of a choice, got 0.99"
    )


def test_of_several_values_of_a_key_the_wrong_one_is_named():
    assert refusal("trainer.steps=1e3", "trainer.steps=12") == "trainer.steps: expected an integer, got '1e3'"
    assert (
        refusal("trainer.steps=12", "trainer.steps=soon") == "trainer.steps: expected an integer, got 'soon'"
    )


@pytest.mark.parametrize("flag", ["-m", "--multirun", "--multi"])
def test_a_sweep_is_refused_with_the_right_command(flag, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert "python -m trainer starts one run only; for a sweep: python -m launch -m" in refusal(
        "ema.decay=0.9,0.99", flag
    )
    monkeypatch.setenv("RANK", "0")
    assert "not under torchrun; a sweep starts torchrun itself: python -m launch -m" in refusal(flag)


def test_files_of_the_users_own_are_typed_and_named_in_errors(tmp_path):
    (tmp_path / "ema").mkdir()
    (tmp_path / "ema" / "mine.yaml").write_text("decay: 0.5\n")
    (tmp_path / "ema" / "wrong.yaml").write_text("dekay: 0.5\n")
    (tmp_path / "ema" / "broken.yaml").write_text("decay: [\n")
    assert to_config(composed(f"-cd={tmp_path}", "ema=mine")).ema.decay == 0.5
    assert refusal(f"-cd={tmp_path}", "ema=wrong").endswith("did you mean ema.decay? (in ema/wrong.yaml)")
    assert refusal(f"-cd={tmp_path}", "ema=broken").startswith(f"{tmp_path}/ema/broken.yaml: line 2: ")


@pytest.mark.parametrize("choice", ["sharding=custom", "optimizer=custom", "optimizer=any"])
def test_a_choice_that_needs_a_name_is_refused_without_one(choice):
    with pytest.raises(
        ConfigError, match=rf"{choice.partition('=')[0]}\.(_target_|name): expected .*, got ''"
    ):
        validate(to_config(composed(choice)), 1)


def test_composing_leaves_the_process_as_it_was(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", "left", "alone"])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    composed("seed=3")
    refusal("ema.deca=1")
    assert sys.argv == ["program", "left", "alone"]
    assert "HYDRA_FULL_ERROR" not in os.environ


PROBE = """
import sys
from trainer.config.compose import compose
try:
    compose(sys.argv[1:])
finally:
    assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (
            ["--help"],
            ["sharding: custom, ddp, fsdp, hsdp, none", "experiment=quickstart ema.decay=0.999", "torchrun"],
        ),
        (["--cfg", "job", "--resolve", "trainer.steps=7"], ["steps: 7"]),
        (["--info", "defaults"], ["sharding/none"]),
        (["-sc", "query=bash"], ["sharding=fsdp"]),
    ],
)
def test_questions_are_answered_without_torch_and_leave_no_file(argv, shown, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COMP_LINE": "trainer sharding="}
    answer = subprocess.run(
        [sys.executable, "-c", PROBE, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    assert all(text in answer.stdout for text in shown), answer.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_composition_makes_no_directory_and_no_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    composed("experiment=quickstart")
    assert list(tmp_path.iterdir()) == []


def test_every_file_of_conf_starts_with_a_comment():
    files = sorted((ROOT / "conf").rglob("*.yaml"))
    assert files and all(OmegaConf.load(file) is not None for file in files)
    assert [file for file in files if not file.read_text().startswith("# ")] == []


@pytest.mark.parametrize("text", ["2024_01_05", "1e3", "true", "0x", "007", "1.50"])
def test_a_text_that_looks_like_a_number_stays_as_typed(text):
    config = to_config(composed(f"run_dir={text}", f"logger.group={text}", "trainer.steps=1_000"))
    assert (config.run_dir, config.logger.group, config.trainer.steps) == (text, text, 1000)


def test_the_hint_for_a_value_that_hydra_cannot_read_works_in_a_shell():
    with pytest.raises(ConfigError) as refused:
        compose(["run_dir=out/lr=0.1"])
    (word,) = shlex.split(str(refused.value).rpartition("type ")[2])
    assert to_config(composed(word)).run_dir == "out/lr=0.1"


@pytest.mark.parametrize(
    ("typed", "value", "steps", "seconds"),
    [
        ("500", 500, 500, None),
        ("1_000", 1000, 1000, None),
        ("0", 0, 0, None),
        ("'20'", "20", 20, None),
        ("30s", "30s", 0, 30),
        ("1.5h", "1.5h", 0, 5400),
    ],
)
def test_checkpoints_are_saved_by_steps_or_by_the_clock(typed, value, steps, seconds):
    config = to_config(composed(f"trainer.save_every={typed}")).trainer
    assert (config.save_every, config.save_steps, config.save_s) == (value, steps, seconds)


def test_checkpoints_are_saved_every_ten_minutes_by_default():
    assert to_config(composed()).trainer.save_s == 600


@pytest.mark.parametrize("typed", ["1.5", "true", "null", "[1]", "-3", "10m", "0s"])
def test_a_time_between_checkpoints_without_a_unit_is_refused_by_its_key(typed):
    with pytest.raises(ConfigError, match=r"^trainer\.save_every: expected a [^\n]*$"):
        validate(to_config(composed(f"trainer.save_every={typed}")), 1)


@pytest.mark.parametrize(
    "typed",
    [
        ["ema.rule={_target_:mine.rising,to:1,steps:${trainer.steps}}"],
        ["ema.rule._target_=mine.rising", "ema.rule.to=1", "ema.rule.steps=${trainer.steps}"],
        ["ema.rule._target_=mine.rising", "+ema.rule.to=1", "+ema.rule.steps=${trainer.steps}"],
    ],
)
def test_a_decay_rule_takes_arguments(typed):
    rule = {"_target_": "mine.rising", "to": 1, "steps": 7}
    assert to_config(composed("trainer.steps=7", *typed)).ema.rule == rule
    first = freeze(composed("trainer.steps=7", *typed))
    changed = ["ema.rule.to=2"]
    assert to_config(resume_config(first, composed(*changed), changed)).ema.rule == {**rule, "to": 2}


def test_arguments_may_follow_where_the_rule_was_a_path():
    first, changed = (
        freeze(composed("ema.rule=mine.rising")),
        ["ema.rule._target_=mine.rising", "ema.rule.to=2"],
    )
    assert to_config(resume_config(first, composed(*changed), changed)).ema.rule == {
        "_target_": "mine.rising",
        "to": 2,
    }
