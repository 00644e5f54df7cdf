"""What a config refuses, its defaults, and that it costs no import of torch."""

import subprocess
import sys
from collections.abc import Iterator, MutableMapping
from dataclasses import fields
from typing import Any

import pytest
import torch

from ema import EMABank, EMAConfig, ExponentialMovingAverage, pitfalls

REFERENCE_DEFAULTS = {
    "decay": 0.9999,
    "type": "constant",
    "start_iter": 0,
    "gamma": 16.97,
    "halflife_kimg": 500.0,
    "rampup_ratio": 0.05,
    "batch_size": 1,
    "fsdp2": True,
    "mode": "full_tensor",
    "dtype": "float32",
}
"""Of the same-named class of NVIDIA Model-Optimizer (modelopt.torch.fastgen)."""


def test_defaults_are_those_of_the_reference() -> None:
    config = EMAConfig()
    config.validate()
    assert {name: getattr(config, name) for name in REFERENCE_DEFAULTS} == REFERENCE_DEFAULTS
    assert [field.name for field in fields(config)][: len(REFERENCE_DEFAULTS)] == list(REFERENCE_DEFAULTS)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("decay", 1.5, "a number in [0, 1]"),
        ("decay", float("nan"), "a number in [0, 1]"),
        ("decay", "0.9", "a number in [0, 1]"),
        ("type", "sine", "one of constant, halflife, power, warmup, debiased, fraction, cosine"),
        ("start_iter", -1, "a whole number of at least 0"),
        ("start_iter", 1.5, "a whole number of at least 0"),
        ("gamma", -0.5, "a number of at least 0"),
        ("halflife_kimg", 0, "a number above 0"),
        ("rampup_ratio", 0.0, "a number above 0, or None"),
        ("batch_size", 0, "a whole number of at least 1"),
        ("fsdp2", 1, "True or False"),
        ("mode", "auto", "one of full_tensor, local_shard"),
        ("dtype", "float8", "one of float32, bfloat16, float16, float64, or None"),
        ("device", "cuda", "one of cpu, or None"),
        ("overlap", 1, "True or False"),
        ("halflife_fraction", 0.0, "a number above 0"),
        ("halflife_fraction", None, "a number above 0"),
        ("reference_batch_size", 0, "a whole number of at least 1, or None"),
        ("reference_batch_size", 32.0, "a whole number of at least 1, or None"),
        ("update_every", 0, "a whole number of at least 1"),
        ("sigma_rel", 0.3, "a number in (0, 0.2887), or None"),
        ("rule", "", "a dotted path, or {_target_: path, **args} with plain arguments, or None"),
        ("include", "head.*", "a list of name patterns"),
        ("average_buffers", [1], "a list of name patterns"),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError) as raised:
        EMAConfig(**{field: value}).validate()
    assert str(raised.value) == f"EMAConfig.{field}: expected {expected}, got {value!r}"


class Foreign(MutableMapping[str, Any]):
    """A config of another library: a mapping of its ten fields, with a `validate` that is no check of it."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(REFERENCE_DEFAULTS | values)

    @classmethod
    def validate(cls, value: Any) -> None:
        raise AssertionError("this is no method of ours")

    def __getitem__(self, name: str) -> Any:
        return vars(self)[name]

    def __setitem__(self, name: str, value: Any) -> None:
        vars(self)[name] = value

    def __delitem__(self, name: str) -> None:
        del vars(self)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self))

    def __len__(self) -> int:
        return len(vars(self))


def test_a_config_of_another_class_is_read_by_its_fields() -> None:
    model = torch.nn.Linear(2, 2)
    foreign = {"fast": Foreign(decay=0.5, dtype="float16"), "every": Foreign(update_every=2)}
    bank, average = EMABank(model, foreign), ExponentialMovingAverage(model, foreign["fast"])
    assert bank["fast"].config == average.config == EMAConfig(decay=0.5, dtype="float16")
    assert bank["every"].config == EMAConfig(update_every=2)
    assert pitfalls(foreign, 100) == pitfalls({name: one.config for name, one in bank.items()}, 100)
    assert average.state_dict()["weight"].dtype is torch.float16


def test_a_config_that_lacks_a_field_or_has_a_bad_one_is_refused_by_name() -> None:
    model, lacking = torch.nn.Linear(2, 2), Foreign()
    del lacking["gamma"], lacking["mode"]
    with pytest.raises(ValueError, match="got Foreign without gamma, mode"):
        ExponentialMovingAverage(model, lacking)
    with pytest.raises(ValueError, match=r"EMAConfig.decay: expected a number in \[0, 1\], got 2"):
        EMABank(model, {"a": Foreign(decay=2)})


def test_config_rules_and_pitfalls_import_no_torch() -> None:
    modules = "ema, ema.config, ema.rules, ema.advice"
    code = f"import sys, {modules}; ema.EMAConfig().validate(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_average_imports_no_tensor_parallelism_of_its_own() -> None:
    """torch.distributed.tensor takes as long to import as torch itself; unsharded loops do not need it."""
    code = (
        "import sys, torch, ema\n"
        "m = torch.nn.Linear(2, 2); a = ema.ExponentialMovingAverage(m, ema.EMAConfig())\n"
        "before = 'torch.distributed.tensor' in sys.modules\n"
        "a.update(m, iteration=0); ema.divergence({'a': a}, m)\n"
        "sys.exit(before)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_resolves_to_the_object_itself() -> None:
    """Also after submodules were imported, which sets attributes of the package."""
    import ema
    import ema.bank
    import ema.distance

    assert all(callable(getattr(ema, name)) for name in ema.__all__)
    assert set(ema.__all__) <= set(dir(ema))
    with pytest.raises(AttributeError, match="averager"):
        ema.averager  # noqa: B018


def test_the_cosine_needs_the_length_of_the_run() -> None:
    with pytest.raises(
        ValueError, match=r"EMAConfig.num_iterations: expected the length of the run for cosine, got 0"
    ):
        EMAConfig(type="cosine").validate()
    EMAConfig(type="cosine", num_iterations=10).validate()


@pytest.mark.parametrize(
    "rule",
    [
        "",
        {},
        {"steps": 3},
        {"_target_": ""},
        {"_target_": "a.b", "x": object()},
        {"_target_": "a.b", 3: 4},
        3,
    ],
)
def test_a_rule_that_is_no_path_with_plain_arguments_is_refused(rule: Any) -> None:
    with pytest.raises(ValueError, match=r"EMAConfig.rule: expected a dotted path, or \{_target_"):
        EMAConfig(rule=rule).validate()


def test_a_rule_may_have_plain_arguments() -> None:
    EMAConfig(rule={"_target_": "a.b", "steps": 3, "knots": [0.1, {"at": None}]}).validate()
