"""What of a configuration only `allow_targets` allows: one refusal names all of it, and a printed command no more."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.makers import composed
from trainer.config.compose import parse_overrides, to_config
from trainer.config.own_code import EVALUATED, EXPORTED, TRAINED, needed, refuse_untrusted
from trainer.config.schema import Config
from trainer.config.targets import build_callback
from trainer.config.trust import resolve_target, trusted_targets
from trainer.config.trust_note import trust_note
from trainer.errors import ConfigError
from trainer.evaluation.custom import load_metrics

FACTORY = "timm.create_model"
OWN: dict[str, Any] = {
    "model": {"_target_": "my_net.Wrap", "inner": [{"_target_": FACTORY}, {"_target_": "torch.nn.Identity"}]},
    "task": {"_target_": "my_task.Task", "features": {"_target_": "my_features.coarse", "size": 2}},
    "data": {
        "_target_": "trainer.data.digits.digits",
        "eval_sets": {"other": {"_target_": "my_data.splits"}},
    },
    "metrics": {"mine": {"_target_": "my_metrics.mine"}},
    "callbacks": {"one": {"_target_": "my_calls.One"}, "two": {"_target_": "my_calls.Two"}},
}


def own(**more: Any) -> Config:
    config = Config(**OWN | more)
    config.ema.rule = "my_rules.beta"
    config.ema.averages = {"slow": {"rule": {"_target_": "my_slow.beta"}}}
    config.optimizer._target_ = "torch.optim.SGD"
    config.optimizer.groups = {"all": {"params": ["*"], "_target_": "my_opt.Sign"}}
    config.schedule._target_ = "my_sched.factor"
    config.logger._target_, config.logger.also = "my_log.Csv", ["csv", "my_other_log.Csv"]
    config.trainer.on_checkpoint = "touch {path}"
    return config


def refusal(config: Config, *allowed: str, groups: tuple[str, ...] = TRAINED) -> tuple[list[str], list[str]]:
    """The keys that are refused, and the entries that the message says to add, with which nothing is refused."""
    with pytest.raises(ConfigError) as error:
        refuse_untrusted(config, allowed, groups)
    keys, _, words = str(error.value).partition(
        ": not allowed by this command line; if you trust this code, add "
    )
    (override,) = parse_overrides(shlex.split(words))
    assert override.key_or_group == "allow_targets"
    entries = [str(entry) for entry in override.value()]
    refuse_untrusted(config, entries, groups)
    return keys.split(", "), entries


def test_one_refusal_has_all_that_a_run_needs() -> None:
    keys, entries = refusal(own())
    assert entries == [
        *("my_net.Wrap", FACTORY, "my_task.Task", "my_features.coarse", "my_data.splits", "my_metrics.mine"),
        *("my_rules.beta", "my_slow.beta", "my_opt.Sign", "my_sched.factor", "my_log.Csv"),
        *("my_other_log.Csv", "my_calls.One", "my_calls.Two", "on_checkpoint=touch {path}"),
    ]
    assert len(keys) == len(entries) and {
        "model.inner[0]._target_",
        "ema.averages.slow.rule._target_",
        "logger.also[1]",
        "callbacks.two._target_",
    } < {*keys}


def test_the_words_keep_what_is_allowed_already_and_add_only_what_the_message_names() -> None:
    allowed = ("my_net.Wrap", "my_task.", "my_features.")
    keys, entries = refusal(own(), *allowed, groups=EVALUATED)
    assert keys == ["model.inner[0]._target_", "data.eval_sets.other._target_", "metrics.mine._target_"]
    assert entries == [*allowed, FACTORY, "my_data.splits", "my_metrics.mine"]
    stranger = Config(model={"_target_": "transformers.pipeline"}, metrics={"m": {"_target_": "own.conf"}})
    keys, entries = refusal(stranger)
    assert keys == ["model._target_", "metrics.m._target_"]
    assert entries == ["transformers.pipeline", "own.conf"]
    assert refusal(stranger, "own.Net", "transformers.pipeline") == (
        ["metrics.m._target_"],
        ["own.Net", "transformers.pipeline", "own.conf"],
    )


def test_one_part_alone_is_refused_and_one_that_is_not_built_is_not() -> None:
    remote = Config(model={"_target_": "transformers.GPT2Model", "trust_remote_code": True})
    for remote.model["trust_remote_code"] in (True, [1]):
        assert refusal(remote) == (["model.trust_remote_code"], ["trust_remote_code"])
    off = Config()
    off.ema.enabled, off.ema.rule = False, "my_rules.beta"
    refuse_untrusted(off, [], TRAINED)


@pytest.mark.parametrize("allowed", [[], ["own_all."], ["own_all.make"], ["own_all.Net"]])
def test_with_the_words_a_function_of_the_users_own_makes_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: list[str]
) -> None:
    """A function counts only by its whole path, which no package covers."""
    (tmp_path / "own_all.py").write_text("def make(): ...\ndef conf(model, batch, random): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = Config(
        model={"_target_": "own_all.make"},
        metrics={"mine": {"_target_": "own_all.conf"}},
        callbacks={"other": {"_target_": "own_other.Call"}},
    )
    _, entries = refusal(config, *allowed)
    assert resolve_target(config.model, group="model", allowed=entries).__name__ == "make"
    assert load_metrics(config.metrics, entries)


def test_a_class_with_a_small_letter_needs_no_more_than_its_package() -> None:
    refuse_untrusted(Config(model={"_target_": "own_all.net"}), ["own_all."], TRAINED)


def test_a_printed_command_has_no_entry_that_only_other_parts_need() -> None:
    allowed = ["my_calls.", "my_net.Wrap", FACTORY, "torch.optim.SGD"]
    config = OWN | {"optimizer": {"_target_": "torch.optim.SGD"}}
    assert needed(config, allowed, EXPORTED) == ["my_net.Wrap", FACTORY]
    defined_elsewhere = ["my_net.", "package_of_wrap.", FACTORY]
    assert needed(config, defined_elsewhere, EXPORTED) == defined_elsewhere


def test_a_name_may_have_a_full_stop_and_what_is_below_a_part_names_no_code() -> None:
    config = Config(metrics={"top.5": {"_target_": "my_metrics.top", "k": {"_target_": "os.system"}}})
    assert refusal(config) == (["metrics.top.5._target_"], ["my_metrics.top"])
    assert needed(asdict(config), ["my_metrics."], EVALUATED) == ["my_metrics."]


@pytest.mark.parametrize(
    ("allowed", "covered"), [([], False), (["my_net."], False), (["my_net.", "timm.create_model"], True)]
)
def test_the_note_beside_a_command_is_there_until_all_of_the_code_is_allowed(
    allowed: list[str], covered: bool
) -> None:
    config = {"model": {"_target_": "my_net.Wrap", "inner": {"_target_": "timm.create_model"}}}
    assert (trust_note(config, EXPORTED, allowed) == "") is covered


def test_a_typed_rule_of_an_average_whose_name_has_a_full_stop_is_trusted() -> None:
    typed = ["ema.averages={a.b: {rule: my_rules.beta}}"]
    refuse_untrusted(to_config(composed(*typed)), trusted_targets(typed), TRAINED)


def test_a_key_cannot_be_read_as_advice() -> None:
    name = "x: fine; add 'allow_targets=[os]' #"
    with pytest.raises(ConfigError) as error:
        refuse_untrusted(Config(callbacks={name: {"_target_": "my_calls.One"}}), [], TRAINED)
    assert str(error.value).startswith(f'"callbacks.{name}._target_": not allowed by this command line; ')
    with pytest.raises(ConfigError) as error:
        build_callback({"_target_": "my_calls.One"}, f"callbacks.{name}", [])
    assert str(error.value).startswith(f'"callbacks.{name}._target_": ')
