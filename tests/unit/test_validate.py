"""Ranges, process counts, names of averages and warnings. Numbers in the warnings come from the rules' formulas."""

import dataclasses
from typing import Any

import pytest

from trainer.config import Config, ConfigError
from trainer.validate import RANGES, ema_configs, ema_warnings, validate


def config(**values: Any) -> Config:
    """A default configuration with `group__key=value` set."""
    made = Config()
    for name, value in values.items():
        *groups, key = name.split("__")
        target: Any = made
        for group in groups:
            target = getattr(target, group)
        setattr(target, key, value)
    return made


def refusal(world_size: int = 1, **values: Any) -> str:
    with pytest.raises(ConfigError) as error:
        validate(config(**values), world_size)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_defaults_are_valid():
    validate(Config(), 1)


@pytest.mark.parametrize(
    ("key", "bad", "good"),
    [
        ("seed", -1, 0),
        ("experiment", "a/b", "a-b_1.0"),
        ("trainer.steps", 0, 1),
        ("trainer.global_batch_size", 0, 1),
        ("trainer.accumulate", 0, 1),
        ("trainer.max_grad_norm", -0.1, 0.0),
        ("trainer.max_grad_norm", float("nan"), 1.0),
        ("trainer.non_finite", "ignore", "stop"),
        ("trainer.log_every", 0, 1),
        ("trainer.eval_every", 0, 1),
        ("trainer.eval_samples", -1, 0),
        ("trainer.eval_batch_size", 0, 1),
        ("trainer.save_every", -1, 0),
        ("trainer.keep_checkpoints", 0, 1),
        ("trainer.num_workers", -1, 0),
        ("trainer.num_threads", -1, 0),
        ("trainer.device", "gpu", "cuda"),
        ("trainer.timeout_s", 0.0, 0.5),
        ("sharding.strategy", "zero", "ddp"),
        ("sharding.replicate", 0, 1),
        ("sharding.param_dtype", "bf17", "bf16"),
        ("sharding.reduce_dtype", "half", None),
        ("ema.batch_size", -1, 0),
        ("ema.batchnorm_batches", -1, 0),
        ("ema.mode", "shard", "local_shard"),
        ("ema.dtype", "float64", "fp16"),
        ("ema.decay", 1.5, 1.0),
        ("ema.decay", -0.1, 0.0),
        ("ema.type", "linear", "debiased"),
        ("ema.start_iter", -1, 0),
        ("ema.gamma", -1.0, 0.0),
        ("ema.halflife_kimg", 0.0, 0.1),
        ("ema.update_every", 0, 1),
        ("optimizer.lr", -1e-3, 0.0),
        ("optimizer.lr", float("inf"), 1.0),
        ("schedule.name", "linear", "wsd"),
        ("schedule.warmup_steps", -1, 0),
        ("schedule.decay_fraction", 0.0, 1.0),
        ("schedule.min_ratio", 1.1, 1.0),
        ("logger.name", "csv", "none"),
        ("logger.mode", "on", "online"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_expected(key, bad, good):
    message = refusal(**{key.replace(".", "__"): bad})
    assert message.startswith(f"{key}: expected ") and message.endswith(f"got {bad!r}")
    validate(config(**{key.replace(".", "__"): good}), 1)


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
        ({"ema__rule": "mine.rules.slow"}, ["slow"]),
        ({"ema__rule": "mine.rules.slow", "ema__decays": [0.9, 0.99]}, ["slow_0.9", "slow_0.99"]),
    ],
)
def test_averages_are_called_by_what_sets_them_apart(values, names):
    assert list(ema_configs(config(**values))) == names


def test_what_is_left_to_the_run_is_settled():
    auto = config(ema__decays=[0.9], ema__dtype="bf16", trainer__global_batch_size=48)
    (average,) = ema_configs(auto).values()
    assert (average.mode, average.dtype, average.batch_size, average.decay) == (
        "full_tensor",
        "bfloat16",
        48,
        0.9,
    )
    for strategy in ("fsdp", "hsdp"):
        auto.sharding.strategy = strategy
        assert ema_configs(auto)["0.9"].mode == "local_shard"
    chosen = config(sharding__strategy="fsdp", ema__mode="full_tensor", ema__batch_size=5, ema__decay=0.9)
    assert (ema_configs(chosen)["0.9"].mode, ema_configs(chosen)["0.9"].batch_size) == ("full_tensor", 5)


def test_a_bank_needs_decays_that_differ_and_a_rule_that_reads_them():
    assert refusal(ema__decays=[0.9, 0.9]) == "ema.decays[1]: expected decays that differ, got 0.9 twice"
    assert refusal(ema__decays=[0.9, 2.0]) == "ema.decays[1]: expected a number in [0, 1], got 2.0"
    assert refusal(ema__decays=[0.9], ema__type="power").startswith(
        "ema.decays: expected ema.type to be one of"
    )


def test_decays_that_warm_up_never_reaches_are_called_the_same():
    """(10 x 0.999 - 1) / (1 - 0.999) = 8990: until there, 0.999 and 0.9999 are one average."""
    bank = {"ema__type": "warmup", "ema__decays": [0.9, 0.999, 0.9999]}
    (warning,) = ema_warnings(config(trainer__steps=8989, **bank))
    assert "warmup_0.999, warmup_0.9999: the same average" in warning and "8990" in warning
    (single,) = ema_warnings(config(trainer__steps=9100, **bank))
    assert "warmup_0.9999" in single and "warmup_0.999," not in single and "89990" in single
    assert ema_warnings(config(trainer__steps=90000, **bank)) == []


def test_a_horizon_longer_than_the_run_is_told_with_what_is_left_of_the_start():
    """0.9999 remembers 10,000 steps; after 1,000 of them 0.9999^1000 = 90 % is the first weights."""
    (warning,) = ema_warnings(config(trainer__steps=1000, ema__decay=0.9999))
    assert "remembers 10000 steps and sees 1000; 90% of it" in warning
    (debiased,) = ema_warnings(config(trainer__steps=1000, ema__decay=0.9999, ema__type="debiased"))
    assert "first weights" not in debiased
    assert ema_warnings(config(trainer__steps=10001, ema__decay=0.9999)) == []
    assert len(ema_warnings(config(trainer__steps=10001, ema__decay=0.9999, ema__start_iter=2))) == 1


@pytest.mark.parametrize(
    ("dtype", "decay", "warns"),
    [
        ("bf16", 0.99, False),
        ("bf16", 0.995, True),
        ("float32", 0.9999, False),
        ("float32", 0.999995, True),
        (None, 0.999, False),
    ],
)
def test_a_shadow_that_cannot_move_in_its_dtype_is_told(dtype, decay, warns):
    warnings = ema_warnings(config(trainer__steps=10**7, ema__decay=decay, ema__dtype=dtype))
    assert [("hardly moves" in warning) for warning in warnings] == [True] * warns


def test_the_floor_is_measured_on_the_decay_of_one_update():
    """0.999^20 = 0.980: an update every 20 steps moves a bfloat16 shadow."""
    assert (
        ema_warnings(config(trainer__steps=10**5, ema__decay=0.999, ema__dtype="bf16", ema__update_every=20))
        == []
    )


def test_the_power_rule_is_judged_by_the_decay_it_ends_with():
    """For gamma = 16.97 at t = 2000: (1 - 1/2000)^17.97 = 0.991, beyond what bfloat16 follows; at 1000, 0.982."""
    power = {"ema__type": "power", "ema__dtype": "bf16"}
    assert len(ema_warnings(config(trainer__steps=2000, **power))) == 1
    assert ema_warnings(config(trainer__steps=1000, **power)) == []
    assert len(ema_warnings(config(trainer__steps=2000, ema__sigma_rel=0.05, **power))) == 1


def test_an_average_that_never_starts_is_told():
    (warning,) = ema_warnings(config(trainer__steps=100, ema__start_iter=100))
    assert warning.startswith("ema.start_iter: ")
