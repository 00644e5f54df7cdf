"""Overrides without effect in a run are refused by their key."""

import pytest

from tests.makers import changed_config as config
from trainer.config.schema import Config
from trainer.config.validate import reject_unused_overrides
from trainer.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "typed", "message"),
    [
        (
            {"type": "fraction"},
            "ema.decay=0.9",
            "ema.decay: read by ema.type constant and warmup and debiased and cosine only",
        ),
        ({}, "ema.gamma=7", "ema.gamma: read by ema.type power only, and ema.type is constant"),
        ({"type": "power"}, "+ema.halflife_kimg=7", "ema.halflife_kimg: read by ema.type halflife only"),
        ({"enabled": False}, "ema.decay=0.9", "ema.decay: the run keeps no average"),
        ({"decays": [0.99]}, "ema.decay=0.9", "ema.decay: ema.decays sets the decays of this run"),
        ({"type": "power", "sigma_rel": 0.1}, "ema.gamma=5", "ema.gamma: ema.sigma_rel overrides it"),
        ({"averages": {"a": {"decay": 0.5}}}, "ema.decay=0.9", "ema.decay: read by ema.type constant"),
        ({"averages": {"a": {"type": "power"}}}, "ema.decay=0.9", "ema.decay: read by ema.type constant"),
        (
            {"averages": {"a": {"sigma_rel": 0.05}}},
            "ema.averages={a: {sigma_rel: 0.05}}",
            "ema.averages.a.sigma_rel: read by ema.type power only, and the type of this average is constant",
        ),
        (
            {"averages": {"a": {"type": "power", "decay": 0.9}}},
            "+ema.averages.a.decay=0.9",
            "ema.averages.a.decay: read by ema.type constant",
        ),
    ],
)
def test_what_was_typed_of_an_average_and_nothing_reads_is_refused(values, typed, message):
    chosen = config(**{f"ema__{key}": value for key, value in values.items()})
    with pytest.raises(ConfigError) as error:
        reject_unused_overrides(chosen, ["seed=1", typed])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "field", "is_read"),
    [
        ("constant", "min_ratio", False),
        ("constant", "decay_fraction", False),
        ("cosine", "decay_fraction", False),
        ("inverse_sqrt", "min_ratio", False),
        ("cosine", "min_ratio", True),
        ("wsd", "decay_fraction", True),
        ("wsd", "min_ratio", True),
    ],
)
def test_what_was_typed_of_a_schedule_and_it_does_not_read_is_refused(name, field, is_read):
    chosen, typed = config(schedule__name=name), [f"schedule.{field}=0.5"]
    if is_read:
        reject_unused_overrides(chosen, typed)
    else:
        with pytest.raises(ConfigError, match=rf"^schedule\.{field}: the schedule {name} does not read it"):
            reject_unused_overrides(chosen, typed)


@pytest.mark.parametrize("group", ["optimizer", "schedule", "logger"])
def test_a_name_is_refused_beside_the_target_that_replaces_it(group):
    chosen = config(**{f"{group}___target_": "mine.Part"})
    with pytest.raises(ConfigError, match=rf"^{group}\.name: {group}\._target_=mine\.Part replaces it"):
        reject_unused_overrides(chosen, [f"{group}.name=none"])
    reject_unused_overrides(chosen, [f"{group}=none", f"{group}._target_=mine.Part"])
    reject_unused_overrides(Config(), [f"{group}.name=none"])


def test_what_a_rule_reads_and_what_averages_of_their_own_may_read_is_not_refused():
    reject_unused_overrides(config(ema__type="warmup"), ["ema.decay=0.9"])
    reject_unused_overrides(config(ema__type="halflife"), ["ema.halflife_kimg=3", "ema.rampup_ratio=null"])
    reject_unused_overrides(config(ema__averages={"slow": {"type": "power"}}), ["ema.gamma=7"])
    entries = {
        "slow": {"type": "power", "sigma_rel": 0.1},
        "own": {"rule": "mine.rule", "gamma": 7.0},
        "a": {},
    }
    reject_unused_overrides(config(ema__averages=entries), ["ema.averages={...}"])
    unread = {"a": {"sigma_rel": 0.1}, "b": {"start_iter": 5}}
    reject_unused_overrides(config(ema__averages=unread), ["ema.averages.b.start_iter=5"])
    reject_unused_overrides(config(ema__rule="mine.rule"), ["ema.gamma=7"])
    reject_unused_overrides(
        config(ema__enabled=False), ["ema=off", "ema.enabled=false", "seed=1", "ema.decays=[]"]
    )
    reject_unused_overrides(config(ema__averages={"a": {"decay": 0.5}, "b": {}}), ["ema.decay=0.9"])
