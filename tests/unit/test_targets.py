"""What is built from a `_target_`, and what its arguments must be."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.makers import refusal_of
from tests.my_package import model, my_package, refusal  # noqa: F401 (an automatic fixture)
from trainer.config.targets import instantiate, load_rule
from trainer.errors import ConfigError
from trainer.seeding import StepRandom


def test_a_model_must_be_a_module_and_its_arguments_modules_or_configurations(tmp_path):
    made = tmp_path / "made"
    assert "expected a subclass of torch.nn.Module" in refusal("my_package.NotAModel", path=str(made))
    hidden = {"_target_": "transformers.GPT2Tokenizer", "vocab_file": str(made)}
    assert refusal("my_package.Open", inner=hidden).startswith("model.inner._target_: expected a module or")
    assert not made.exists()


def test_nested_targets_are_checked_wherever_they_hide():
    for hidden in ({"x": [{"_target_": "os.getcwd"}]}, {"x": {"y": {"_target_": "os.getcwd"}}}):
        message = refusal("my_package.Open", **hidden)
        assert message.startswith("model.x") and "_target_: 'os.getcwd' is not under" in message


@pytest.mark.parametrize("key", ["_partial_", "_args_", "_recursive_", "_convert_"])
def test_hydras_other_special_keys_are_refused(key):
    assert refusal("my_package.Open", **{key: True}).startswith(f"model.{key}: ")


def test_an_interpolation_that_got_this_far_is_refused():
    assert refusal("my_package.Open", x=["${oc.env:HOME}"]).startswith(
        "model.x[0]: expected a resolved value"
    )


def test_unknown_and_missing_arguments_are_named():
    message = refusal("my_package.Net", widht=3)
    assert message.startswith(
        "model.widht: Net takes no such argument; did you mean width? It takes width, share, "
    )
    assert "removes it" not in message
    assert refusal("my_package.Net", zzz=3).endswith("; '~model.zzz' removes it if a file sets it")
    nested = refusal("my_package.Open", inner=[{"_target_": "my_package.Net", "zzz": 3}])
    assert nested.startswith("model.inner[0].zzz: Net takes no such") and "removes it" not in nested
    assert refusal("my_package.Net") == "model.width: Net needs a value: model.width=VALUE"
    assert model("my_package.Open", whatever=3).taken == {"whatever": 3}


@pytest.mark.parametrize(
    ("name", "given", "taken"),
    [
        ("width", 3, 3),
        ("share", 1, 1.0),
        ("flag", "yes", True),
        ("name", 3, "3"),
        ("sizes", [1, 2], [1, 2]),
        ("kind", "b", "b"),
        ("maybe", None, None),
        ("implicit", None, None),
        ("other", {"a": [1]}, {"a": [1]}),
    ],
)
def test_arguments_arrive_in_the_types_of_the_signature(name, given, taken):
    received = model("my_package.Net", **{"width": 1, name: given}).taken[name]
    assert received == taken and type(received) is type(taken)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("width", "abc", "int"),
        ("width", 1.5, "int"),
        ("width", True, "int"),
        ("width", None, "int"),
        ("share", "x", "float"),
        ("flag", "maybe", "bool"),
        ("sizes", [1, "x"], "list[int]"),
        ("sizes", 3, "list[int]"),
        ("kind", "c", "one of a, b"),
        ("maybe", "x", "int | null"),
    ],
)
def test_an_argument_of_the_wrong_type_is_named(name, given, expected):
    assert (
        refusal("my_package.Net", **{"width": 1, name: given})
        == f"model.{name}: expected {expected}, got {given!r}"
    )


def test_what_a_constructor_refuses_is_one_line_with_its_key():
    assert refusal("my_package.Net", width=-1) == "model: width must not be negative, got -1"
    assert refusal("my_package.Failing", error="prefixed") == "model: width must be even"
    nested = {"_target_": "my_package.Config", "depth": 0}
    assert refusal("my_package.Open", config=nested) == "model.config: depth must be positive"
    assert refusal("my_package.Open", config={**nested, "depth": "x"}).startswith(
        "model.config.depth: expected int"
    )


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("bare", "AssertionError (HYDRA_FULL_ERROR=1 shows where)"),
        ("key", "KeyError: 'n_embd' (HYDRA_FULL_ERROR=1 shows where)"),
        ("own", "StrictError: first line (HYDRA_FULL_ERROR=1 shows where)"),
        ("type", "TypeError: of two lines (HYDRA_FULL_ERROR=1 shows where)"),
    ],
)
def test_an_error_of_any_class_is_one_line_with_its_key_and_its_cause(error, reason):
    failing = {"_target_": "my_package.Failing", "error": error}
    nested = {"_target_": "my_package.Open", "inner": failing}
    for key, node in (("model", failing), ("model.inner", nested)):
        with pytest.raises(ConfigError) as caught:
            instantiate(node, group="model", allowed=["my_package."])
        assert str(caught.value) == f"{key}: {reason}"
        assert caught.value.__cause__.__traceback__ is not None
        assert not isinstance(caught.value.__cause__, ConfigError)


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        ("my_package.make", {"width": 3}),
        ("my_package.Pretrained.from_pretrained", {"name": "x"}),
        ("my_package.Child.from_pretrained", {"name": "x"}),
    ],
)
def test_a_model_comes_from_a_function_or_class_method_where_that_name_was_typed(target, arguments):
    assert model(target, (target,), **arguments).in_features == 3
    assert model("my_package.Open", (target, "my_package.Open"), inner={"_target_": target, **arguments})
    assert refusal(target, **arguments).endswith(f"; 'allow_targets=[{target}]' allows the call")
    assert "takes no such argument" in refusal(target, (target,), **arguments, depth=2)


def test_a_factory_must_make_a_module():
    assert refusal("my_package.make_text", ("my_package.make_text",)) == (
        "model._target_: expected a torch.nn.Module, my_package.make_text returned str"
    )


def test_nested_configurations_are_built_and_extra_arguments_passed_as_they_are():
    config = {"_target_": "my_package.Config", "depth": 2}
    extra = torch.zeros(3)
    built = instantiate(
        {"_target_": "my_package.Open", "config": config},
        group="model",
        allowed=["my_package."],
        tensor=extra,
    )
    assert built.taken["config"].depth == 2
    assert built.taken["tensor"] is extra


def test_data_may_be_a_function_and_the_others_may_not():
    digits = {"_target_": "trainer.data.digits.digits"}
    assert len(instantiate(digits, group="data", allowed=()).train) > 1000
    with pytest.raises(ConfigError, match=r"data\._target_: .* is numpy\.load"):
        instantiate({"_target_": "trainer.data.digits.np.load", "file": "x"}, group="data", allowed=())
    with pytest.raises(ConfigError, match=r"expected a class, and .* is function"):
        model("my_package.rule")


def test_a_decay_rule_is_a_function_that_the_user_allowed():
    assert load_rule("my_package.rule", ["my_package."])(1, None) == 0.5
    node = {"_target_": "my_package.rising", "steps": 4}
    assert load_rule(node, ["my_package."])(1, None) == 0.25
    assert "steps: expected int, got 'x'" in refusal_of(load_rule, {**node, "steps": "x"}, ["my_package."])
    assert "must accept (t, config) and these keys" in refusal_of(
        load_rule, {**node, "to": 1}, ["my_package."]
    )
    assert "ema.rule._target_: expected the dotted path" in refusal_of(
        load_rule, {"steps": 4}, ["my_package."]
    )
    with pytest.raises(ConfigError, match=r"ema\.rule: .* is not under any allowed prefix"):
        load_rule("my_package.rule", [])
    with pytest.raises(ConfigError, match=r"ema\.rule: expected a function"):
        load_rule("my_package.Net", ["my_package."])


def test_hydra_instantiates_in_one_file_only():
    sources = (Path(__file__).parents[2] / "trainer").rglob("*.py")
    assert [path.name for path in sources if "hydra.utils" in path.read_text()] == ["targets.py"]


def test_a_function_in_a_task_is_not_called_but_gets_its_arguments_bound() -> None:
    """A class in a task is built, as in every group."""
    flow = {
        "_target_": "trainer.tasks.flow_matching.FlowMatching",
        "image_shape": [1, 2, 2],
        "num_classes": 2,
    }
    features = {"_target_": "torch.flatten"}
    line = refusal_of(lambda: instantiate(flow | {"features": features}, group="task", allowed=[]))
    assert line.startswith("task.features._target_: 'torch.flatten' is not under trainer.tasks.")
    parts = {
        "features": {"_target_": "torch.nn.functional.softplus_like"},
        "decoder": {"_target_": "torch.nn.Upsample", "scale_factor": 2},
    }
    line = refusal_of(lambda: instantiate(flow | parts, group="task", allowed=["torch.nn."]))
    assert line.startswith("task.features._target_: 'torch.nn.functional' has no 'softplus_like'")
    parts["features"] = {"_target_": "torch.nn.functional.normalize", "dim": 2, "wrong": 1}
    line = refusal_of(lambda: instantiate(flow | parts, group="task", allowed=["torch.nn."]))
    assert line.startswith("task.features: normalize must accept (images) and these keys: ")
    del parts["features"]["wrong"]
    task = instantiate(flow | parts | {"distance_steps": 1}, group="task", allowed=["torch.nn."])
    batch = {"image": torch.rand(4, 1, 2, 2), "label": torch.tensor([0, 1, 0, 1])}
    random = StepRandom(0, 0, 0, 4, 4)
    seen = task.metrics(lambda x, t, label: x, batch, random)["set/real"]
    assert torch.equal(seen, nn.functional.normalize(nn.Upsample(scale_factor=2)(batch["image"]), dim=2))
