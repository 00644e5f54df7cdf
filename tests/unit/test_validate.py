"""Ranges, process counts, the averages of a run and their names. What is warned of is `ema.advice`' subject."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from ema.advice import pitfalls
from ema.rules import Rule
from tests.makers import changed_config as config
from tests.makers import refusal_of
from trainer.config.averages import settle_averages
from trainer.config.schema import Config
from trainer.config.validate import (
    RANGES,
    validate,
    validate_evaluation,
)
from trainer.errors import ConfigError


def refusal(world_size: int = 1, **values: Any) -> str:
    return refusal_of(validate, config(**values), world_size)


def test_the_defaults_are_valid():
    validate(Config(), 1)


@pytest.mark.parametrize(
    ("key", "bad", "good"),
    [
        ("seed", -1, 0),
        ("experiment", "a/b", "a-b_1.0"),
        ("trainer.steps", 0, 1),
        ("trainer.global_batch_size", 0, 1),
        ("trainer.global_batch_size", 10**12, 2**24),
        ("trainer.accumulate", 0, 1),
        ("trainer.max_grad_norm", -0.1, 0.0),
        ("trainer.max_grad_norm", float("nan"), 1.0),
        ("trainer.non_finite", "ignore", "stop"),
        ("trainer.log_every", 0, 1),
        ("trainer.eval_every", 0, 1),
        ("trainer.eval_samples", -1, 0),
        ("trainer.eval_batch_size", 0, 1),
        ("trainer.save_every", -1, 0),
        ("trainer.save_every", "0min", "0.5min"),
        ("trainer.save_every", "10 minutes", "10min"),
        ("trainer.save_every", "", "2h"),
        ("trainer.save_every", "1e3", "30s"),
        ("trainer.keep_checkpoints", 0, 1),
        ("trainer.num_workers", -1, 0),
        ("trainer.num_workers", 100_000, 256),
        ("trainer.num_threads", -1, 0),
        ("trainer.num_threads", 100_000, 1024),
        ("trainer.device", "gpu", "cuda"),
        ("trainer.timeout_s", 0.0, 0.5),
        ("sharding.strategy", "zero", "ddp"),
        ("sharding.replicate", 0, 1),
        ("sharding.param_dtype", "bf17", "bf16"),
        ("sharding.reduce_dtype", "half", None),
        ("ema.batch_size", -1, 0),
        ("ema.batchnorm_batches", -1, 0),
        ("ema.mode", "shard", "local_shard"),
        ("ema.dtype", "float8", "fp64"),
        ("ema.dtype", "half", "fp16"),
        ("ema.decay", 1.5, 1.0),
        ("ema.decay", -0.1, 0.0),
        ("ema.type", "linear", "debiased"),
        ("ema.start_iter", -1, 0),
        ("ema.gamma", -1.0, 0.0),
        ("ema.halflife_kimg", 0.0, 0.1),
        ("ema.update_every", 0, 1),
        ("ema.halflife_fraction", 0.0, 0.5),
        ("ema.reference_batch_size", 0, 64),
        ("ema.device", "gpu", "cpu"),
        ("optimizer.lr", -1e-3, 0.0),
        ("optimizer.lr", float("inf"), 1.0),
        ("schedule.name", "linear", "wsd"),
        ("schedule.warmup_steps", -1, 0),
        ("schedule.decay_fraction", 0.0, 1.0),
        ("schedule.min_ratio", 1.1, 1.0),
        ("logger.name", "mlflow", "none"),
        ("logger.mode", "on", "online"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_expected(key, bad, good):
    message = refusal(**{key.replace(".", "__"): bad})
    assert message.startswith(f"{key}: expected ") and message.endswith(f"got {bad!r}")
    validate(config(**{key.replace(".", "__"): good}), 1)


@pytest.mark.parametrize("key", ["sharding__param_dtype", "sharding__reduce_dtype"])
def test_float16_skips_steps_that_overflow_so_it_cannot_stop_at_them(key):
    for name in ("float16", "fp16"):
        validate(config(**{key: name}), 1)
        stopping = {key: name, "trainer__non_finite": "stop"}
        assert refusal(**stopping).startswith("trainer.non_finite: expected skip with float16")
        validate_evaluation(config(**stopping), 1)


def test_every_range_belongs_to_a_field():
    for key in RANGES:
        node: Any = Config()
        for name in key.split("."):
            assert name in {field.name for field in dataclasses.fields(node)}, key
            node = getattr(node, name)


def test_the_batch_must_divide_over_processes_and_micro_batches():
    message = refusal(3, trainer__global_batch_size=33, trainer__accumulate=2, sharding__strategy="ddp")
    assert message.startswith("trainer.global_batch_size: expected a multiple of 6 (3 processes x")
    assert message.endswith("such as 30, got 33")
    assert "such as 8, got 3" in refusal(8, trainer__global_batch_size=3, sharding__strategy="ddp")
    validate(config(trainer__global_batch_size=30, trainer__accumulate=2, sharding__strategy="ddp"), 3)


def test_one_process_may_shard_and_many_processes_must():
    assert "sharding=fsdp" in refusal(2)
    for strategy in ("ddp", "fsdp", "hsdp"):
        validate(config(sharding__strategy=strategy), 1)


def test_replicas_must_divide_the_processes_and_are_for_hsdp_alone():
    assert refusal(4, sharding__strategy="hsdp", sharding__replicate=3).startswith(
        "sharding.replicate: expected a"
    )
    assert "only hsdp" in refusal(4, sharding__strategy="fsdp", sharding__replicate=2)
    validate(config(sharding__strategy="hsdp", sharding__replicate=2), 4)


def test_any_number_of_processes_may_evaluate_whole_or_sharded():
    for strategy in ("none", "ddp", "fsdp"):
        validate_evaluation(config(sharding__strategy=strategy, trainer__global_batch_size=32), 3)
    with pytest.raises(ConfigError, match=r"sharding.replicate: expected a divisor of the 3 processes"):
        validate_evaluation(config(sharding__strategy="hsdp", sharding__replicate=2), 3)
    with pytest.raises(ConfigError, match=r"trainer.eval_samples: expected at least 0, or auto, got -1"):
        validate_evaluation(config(trainer__eval_samples=-1), 1)


def test_an_average_that_refuses_sharded_models_is_refused_beside_them():
    assert refusal(2, sharding__strategy="fsdp", ema__fsdp2=False).startswith("ema.fsdp2: ")
    validate(config(sharding__strategy="fsdp", ema__fsdp2=False, ema__enabled=False), 2)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"ema__decay": 0.999}, ["0.999"]),
        ({"ema__enabled": False}, []),
        ({"ema__decays": [0.99, 0.9]}, ["0.99", "0.9"]),
        ({"ema__type": "warmup", "ema__decays": [0.9, 0.99]}, ["warmup_0.9", "warmup_0.99"]),
        ({"ema__type": "debiased", "ema__decay": 0.5}, ["debiased_0.5"]),
        ({"ema__type": "power"}, ["power_16.97"]),
        ({"ema__type": "power", "ema__sigma_rel": 0.1}, ["power_sigma0.1"]),
        ({"ema__type": "halflife"}, ["halflife_500kimg"]),
        ({"ema__type": "fraction"}, ["fraction_0.05"]),
        ({"ema__decay": 0.999, "ema__reference_batch_size": 64}, ["0.999"]),
        ({"ema__averages": {"slow": {}, "power_7": {"type": "power"}}}, ["slow", "power_7"]),
        ({"ema__averages": {"slow": {}}, "ema__enabled": False}, []),
        ({"ema__averages": None, "ema__decay": 0.5}, ["0.5"]),
        ({"ema__rule": "mine.rules.slow"}, ["slow"]),
        ({"ema__rule": "mine.rules.slow", "ema__decays": [0.9, 0.99]}, ["slow_0.9", "slow_0.99"]),
    ],
)
def test_averages_are_called_by_what_sets_them_apart(values, names):
    assert list(settle_averages(config(**values))) == names


def test_what_is_left_to_the_run_is_settled():
    auto = config(ema__decays=[0.9], ema__dtype="bf16", trainer__global_batch_size=48)
    (average,) = settle_averages(auto).values()
    assert (average.mode, average.dtype, average.batch_size, average.decay) == (
        "full_tensor",
        "bfloat16",
        48,
        0.9,
    )
    for strategy in ("fsdp", "hsdp"):
        auto.sharding.strategy = strategy
        assert settle_averages(auto)["0.9"].mode == "local_shard"
    chosen = config(sharding__strategy="fsdp", ema__mode="full_tensor", ema__batch_size=5, ema__decay=0.9)
    assert (settle_averages(chosen)["0.9"].mode, settle_averages(chosen)["0.9"].batch_size) == (
        "full_tensor",
        5,
    )


def test_a_bank_needs_decays_that_differ_and_a_rule_that_reads_them():
    assert refusal(ema__decays=[0.9, 0.9]) == "ema.decays[1]: expected decays that differ, got 0.9 twice"
    assert refusal(ema__decays=[0.9, 2.0]) == "ema.decays[1]: expected a number in [0, 1], got 2.0"
    assert refusal(ema__decays=[0.9], ema__type="power").startswith(
        "ema.decays: expected ema.type to be one of"
    )


def test_named_averages_differ_from_the_group_in_what_they_say_and_are_settled_alike():
    mixed = config(
        ema__decay=0.9,
        ema__start_iter=7,
        ema__averages={
            "slow": {"decay": 0.9999, "dtype": "bf16", "mode": "full_tensor"},
            "wide": {"type": "power", "gamma": 6.94, "dtype": None, "batch_size": 3},
            "exact": {"dtype": "fp64", "batch_size": 0, "mode": "auto"},
        },
        sharding__strategy="fsdp",
        trainer__global_batch_size=48,
    )
    validate(mixed, 1)
    averages = settle_averages(mixed)
    facts = {
        name: (a.decay, a.type, a.start_iter, a.dtype, a.mode, a.batch_size) for name, a in averages.items()
    }
    assert facts == {
        "slow": (0.9999, "constant", 7, "bfloat16", "full_tensor", 48),
        "wide": (0.9, "power", 7, None, "local_shard", 3),
        "exact": (0.9, "constant", 7, "float64", "local_shard", 48),
    }
    assert averages["wide"].gamma == 6.94


@pytest.mark.parametrize(
    ("averages", "message"),
    [
        (
            {"slow": {"deca": 0.9}},
            "ema.averages.slow.deca: unknown key; did you mean ema.averages.slow.decay?",
        ),
        ({"slow": {"zzz": 0.9}}, "ema.averages.slow.zzz: unknown key"),
        ({"slow": {"decays": [0.9]}}, "ema.averages.slow.decays: unknown key"),
        ({"slow": {"decay": "abc"}}, "ema.averages.slow.decay: expected a number in [0, 1], got 'abc'"),
        ({"a": {}, "b": {"decay": 2}}, "ema.averages.b.decay: expected a number in [0, 1], got 2"),
        (
            {"slow": {"start_iter": 1e3}},
            "ema.averages.slow.start_iter: expected a whole number of at least 0, or a share of trainer.steps in (0,"
            " 1), got 1000.0",
        ),
        ({"slow": {"batch_size": False}}, "ema.averages.slow.batch_size: expected a whole number"),
        ({"slow": {"dtype": ["fp32"]}}, "ema.averages.slow.dtype: expected one of float32, bfloat16,"),
        ({"slow": {"include": "head"}}, "ema.averages.slow.include: expected a list of name patterns"),
        ({"slow": 0.9}, "ema.averages.slow: expected fields of an average, as in {decay: 0.999}, got 0.9"),
        ({"slow": None}, "ema.averages.slow: expected fields of an average"),
        ({"a/b": {}}, "ema.averages: expected names of letters, digits, _, ., + and -"),
        ({"": {}}, "ema.averages: expected names of letters"),
        ({"live": {}}, "ema.averages: expected names of letters"),
    ],
)
def test_a_named_average_is_refused_by_the_key_that_is_wrong(averages, message):
    assert refusal(ema__averages=averages).startswith(message)


def test_a_bad_value_that_named_averages_share_is_named_where_it_is_set():
    assert refusal(ema__averages={"slow": {}}, ema__decay=1.5).startswith("ema.decay: expected")
    assert refusal(ema__averages={"slow": {}}, ema__gamma=-1.0).startswith("ema.gamma: expected")
    sharded = {"sharding__strategy": "fsdp"}
    assert refusal(ema__averages={"slow": {"fsdp2": False}}, **sharded).startswith(
        "ema.averages.slow.fsdp2: "
    )
    assert refusal(ema__averages={"slow": {}}, ema__fsdp2=False, **sharded).startswith("ema.fsdp2: ")
    validate(config(ema__averages={"slow": {"fsdp2": True}}, ema__fsdp2=False, **sharded), 1)


def test_decays_and_named_averages_are_not_one_bank():
    message = refusal(ema__averages={"slow": {}}, ema__decays=[0.9])
    assert message.startswith("ema.averages: cannot be combined with ema.decays; clear one: ")


def warnings_of(config: Config, rules: Mapping[str, Rule] | None = None) -> list[str]:
    return pitfalls(settle_averages(config), config.trainer.steps, rules=rules)


def test_warnings_are_the_pitfalls_of_the_runs_averages_over_its_steps():
    """0.9999 remembers 10,000 steps; after 1,000 of them 0.9999^1000 = 90 % is the first weights."""
    (warning,) = warnings_of(config(trainer__steps=1000, ema__averages={"slow": {"decay": 0.9999}}))
    assert warning.startswith("ema slow: remembers 10000 ") and "90%" in warning
    assert warnings_of(config(trainer__steps=50_000, ema__decay=0.9999)) == []
    assert warnings_of(config(trainer__steps=10, ema__enabled=False)) == []


def test_warnings_know_a_users_rule_where_it_is_given():
    bank = config(trainer__steps=100, ema__rule="mine.mean", ema__decays=[0.9, 0.99])
    assert warnings_of(bank) == []
    rules = dict.fromkeys(["mean_0.9", "mean_0.99"], lambda t, config: 1 - 1 / t)
    (warning,) = warnings_of(bank, rules)
    assert warning.startswith("ema mean_0.9, mean_0.99: equal during the whole run")


@pytest.mark.parametrize(
    ("key", "bad", "good"),
    [
        ("project", "team/project", "project"),
        ("project", "", "p"),
        ("project", "x" * 129, "x" * 128),
        ("project", "50%", "50"),
        ("project", "a\nb", "a b"),
        ("entity", "team/project", "my-team"),
        ("entity", "", None),
        ("group", "x" * 129, "x" * 128),
        ("tags", [""], []),
        ("tags", ["good", "x" * 65], ["good", "x" * 64]),
    ],
)
def test_what_wandb_refuses_is_refused_by_key_and_only_for_wandb(key: str, bad: object, good: object) -> None:
    name = f"logger__{key}"
    assert refusal(**{name: bad}).startswith(f"logger.{key}: expected ")
    validate(config(**{name: good}), 1)
    validate(config(**{name: bad, "logger__name": "none"}), 1)
    validate(config(**{name: bad, "logger___target_": "mine.Logger"}), 1)


def test_the_length_of_the_run_and_a_start_as_a_share_are_settled():
    averages = settle_averages(
        config(
            trainer__steps=400,
            ema__start_iter=0.25,
            ema__averages={
                "rising": {"type": "cosine", "decay": 0.9},
                "late": {"start_iter": 0.5},
                "shorter": {"type": "cosine", "num_iterations": 300, "start_iter": 7},
                "own": {"rule": {"_target_": "mine.rising", "to": 1}},
            },
        )
    )
    facts = {name: (a.start_iter, a.num_iterations) for name, a in averages.items()}
    assert facts == {"rising": (100, 400), "late": (200, 400), "shorter": (7, 300), "own": (100, 400)}
    (name,) = settle_averages(config(ema__type="cosine", ema__decay=0.996))
    assert name == "cosine_0.996"
    (name,) = settle_averages(config(ema__rule={"_target_": "mine.rising", "to": 1}))
    assert name == "rising"


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5, -0.1, float("nan")])
def test_a_start_that_is_no_share_is_refused(share):
    assert refusal(ema__start_iter=share).startswith(
        "ema.start_iter: expected a whole number of at least 0, or a share of trainer.steps in (0, 1), got "
    )
