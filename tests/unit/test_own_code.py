"""What of a configuration only `allow_targets` allows: one refusal names all of it, and a printed command no more."""

from typing import Any

import pytest

from trainer.config.compose import parse_overrides
from trainer.config.own_code import EVALUATED, EXPORTED, TRAINED, needed, refuse_untrusted
from trainer.config.schema import Config
from trainer.errors import ConfigError

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
    """The keys that are refused, and the entries that the message says to add."""
    with pytest.raises(ConfigError) as error:
        refuse_untrusted(config, allowed, groups)
    keys, _, words = str(error.value).partition(
        ": not allowed by this command line; if you trust this code, add "
    )
    (override,) = parse_overrides([words.strip("\"'")])
    assert override.key_or_group == "allow_targets"
    return keys.split(", "), [str(entry) for entry in override.value()]


def test_one_refusal_has_all_that_a_run_needs_and_then_nothing_is_refused() -> None:
    packages = "net task features data metrics rules slow opt sched log other_log calls"
    keys, entries = refusal(own())
    command = "on_checkpoint=touch {path}"
    assert {*entries} == {*(f"my_{name}." for name in packages.split()), FACTORY, command}
    assert len(keys) == 14 and {
        "ema.averages.slow.rule._target_",
        "logger.also[1]",
        "callbacks.two._target_",
    } < {*keys}
    refuse_untrusted(own(), entries, TRAINED)


def test_what_is_allowed_already_is_kept_in_the_advice_and_each_command_needs_its_own_parts_only() -> None:
    keys, entries = refusal(own(), "my_net.Wrap", "my_task.", "my_features.", groups=EVALUATED)
    assert keys == ["data.eval_sets.other._target_", "metrics.mine._target_"]
    assert entries == ["my_net.Wrap", "my_task.", "my_features.", "my_data.", "my_metrics.", FACTORY]
    assert needed(OWN, ["my_calls.", "my_net.Wrap", FACTORY], EXPORTED) == ["my_net.Wrap", FACTORY]
    assert needed({}, ["my_calls."], EVALUATED) == []


def test_one_part_alone_is_left_to_the_place_that_builds_it() -> None:
    refuse_untrusted(Config(callbacks=OWN["callbacks"]), [], TRAINED)
    remote = Config(model={"_target_": "transformers.GPT2Model", "trust_remote_code": True})
    refuse_untrusted(remote, [], TRAINED)
    remote.callbacks = OWN["callbacks"]
    assert refusal(remote)[1] == ["trust_remote_code", "my_calls."]
