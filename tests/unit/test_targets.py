"""What a `_target_` may name, and what its arguments must be. Nothing here may be called unless it is allowed."""

import sys
import typing
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.makers import refusal_of
from trainer.config.targets import instantiate, load_rule
from trainer.config.trust import resolve_target, trusted_targets
from trainer.errors import ConfigError
from trainer.seeding import StepRandom

PACKAGE = """
import os, subprocess
from typing import Literal
from torch import nn, Tensor
from my_elsewhere import Borrowed

class Net(nn.Module):
    def __init__(self, width: int, share: float = 0.5, flag: bool = False, name: str = "n", sizes: list[int] = [1],
                 kind: Literal["a", "b"] = "a", maybe: int | None = None, other: object = None, implicit: int = None):
        super().__init__()
        if width < 0:
            raise ValueError(f"width must not be negative, got {width}")
        self.taken = dict(width=width, share=share, flag=flag, name=name, sizes=sizes, kind=kind, maybe=maybe,
                          other=other, implicit=implicit)

class Open(nn.Module):
    def __init__(self, **anything):
        super().__init__()
        self.taken = anything

class _Private(Net):
    pass

class NotAModel:
    def __init__(self, path="x"):
        open(path, "w").close()

class Config:
    def __init__(self, depth: int):
        if depth < 1:
            raise ValueError("depth must be positive")
        self.depth = depth

class Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        raise {
            "bare": AssertionError(),
            "key": KeyError("n_embd"),
            "own": type("StrictError", (Exception,), {})("first line\\n" + "and more " * 100),
            "prefixed": ValueError("model: width must be even"),
            "type": TypeError("of\\n  two lines"),
        }[error]

class Pretrained(nn.Module):
    @classmethod
    def from_pretrained(cls, name: str, width: int = 3):
        return make(width)

class Child(Pretrained):
    pass

def make(width: int):
    return nn.Linear(width, 1)

def make_text(width: int = 1):
    return "text"

def rising(t, config, steps: int):
    return t / steps


def rule(t, config):
    return 0.5

not_callable = 3
"""


@pytest.fixture(autouse=True)
def my_package(tmp_path, monkeypatch):
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text(PACKAGE)
    (tmp_path / "my_elsewhere.py").write_text("from torch import nn\nclass Borrowed(nn.Module):\n    pass\n")
    (tmp_path / "my_broken.py").write_text("import a_module_nobody_has\n")
    (tmp_path / "my_failing.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("my_package", "my_elsewhere", "my_broken", "my_failing"):
        sys.modules.pop(name, None)


def model(
    target: str, allowed: typing.Sequence[str] = ("my_package.",), **arguments: typing.Any
) -> nn.Module:
    return instantiate({"_target_": target, **arguments}, group="model", allowed=allowed)


refusal = partial(refusal_of, model)


def test_a_class_of_torch_is_built_on_anybodys_word():
    linear = model("torch.nn.Linear", (), in_features=3, out_features=4)
    assert isinstance(linear, nn.Linear) and linear.weight.shape == (4, 3)


def test_a_class_of_the_users_own_needs_its_prefix_or_its_name():
    message = refusal("my_package.Net", (), width=1)
    assert message.startswith("model._target_: 'my_package.Net' is not under models., torch.nn.,")
    assert message.endswith("add 'allow_targets=[my_package.]'")
    for allowed in ("my_package.", "my_package", "my_package.Net"):
        assert model("my_package.Net", (allowed,), width=1).taken["width"] == 1
    assert "is not under" in refusal("my_package.Net", ("my_pack",), width=1)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "torch.nn.modules.module.warnings.catch_warnings",
        "torch.nn.functional.relu",
        "torch.nn.init.trunc_normal_",
        "torch.nn.Module.__init__",
        "torch.nn.modules.linear.__builtins__",
        "torch.nn",
        "torch.nn.",
        "torch..nn.Linear",
        "torch.nn.Linear ",
        "",
        "transformers.utils.import_utils.subprocess.Popen",
    ],
)
def test_whatever_is_no_class_defined_under_a_prefix_is_refused(target):
    assert refusal(target, ()).startswith("model._target_: ")


def test_a_class_that_was_only_imported_there_is_refused_unless_it_was_typed():
    assert "which is not under" in refusal("my_package.Borrowed")
    assert "which is not under" in refusal("my_package.subprocess.Popen", args="x")
    assert type(model("my_package.Borrowed", ("my_package.Borrowed",))).__name__ == "Borrowed"


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


def test_a_private_name_is_refused():
    assert "expected a dotted path of public names" in refusal("my_package._Private", width=1)


def test_a_misspelled_target_says_what_was_meant():
    assert (
        refusal("my_package.Nett", width=1)
        == "model._target_: 'my_package' has no 'Nett'; did you mean 'Net'?"
    )
    assert "there is no module 'my_packag'" in refusal("my_packag.Net", ("my_packag.",))
    assert "needs the module 'a_module_nobody_has'" in refusal("my_broken.Net", ("my_broken.",))


def test_unknown_and_missing_arguments_are_named():
    message = refusal("my_package.Net", widht=3)
    assert message.startswith(
        "model.widht: Net takes no such argument; did you mean width? It takes width, share, "
    )
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


def test_a_file_that_cannot_be_imported_is_named():
    message = refusal("my_failing.Net", ("my_failing.",))
    assert message.startswith("model._target_: importing my_failing: ZeroDivisionError: division by zero (")


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


def test_resolving_a_target_calls_nothing():
    node = {"_target_": "my_package.Net", "width": -1}
    assert resolve_target(node, group="model", allowed=["my_package."]).__name__ == "Net"


def test_only_what_was_typed_on_this_command_line_is_trusted():
    typed = [
        "model._target_=my.Net",
        "+model.config={_target_: a.B, x: [{_target_: c.D}]}",
        "ema.rule=my.rules.slow",
        "ema.averages.odd.rule=my.rules.odd",
        "ema.averages={even: {rule: my.rules.even}}",
        "trainer.steps=3",
        "experiment=quickstart",
        "~data._target_",
    ]
    assert trusted_targets(typed) == [
        "my.Net",
        "a.B",
        "c.D",
        "my.rules.slow",
        "my.rules.odd",
        "my.rules.even",
    ]
    with pytest.raises(ConfigError):
        trusted_targets(["model._target_"])


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


def test_arguments_that_run_code_must_be_typed():
    message = refusal("my_package.Open", trust_remote_code=True)
    assert message == (
        "model.trust_remote_code: True runs code from outside the installed packages;"
        " 'allow_targets=[trust_remote_code]' allows it"
    )
    assert refusal("my_package.Open", inner=[{"megatron_core": "os"}]).startswith(
        "model.inner[0].megatron_core:"
    )
    # A library takes any true value, also one that is itself a collection.
    for value in ([1], {"a": 1}):
        assert refusal("my_package.Open", trust_remote_code=value).startswith("model.trust_remote_code: ")
    unpickled = refusal("my_package.Open", kwargs={"weights_only": False})
    assert unpickled.startswith("model.kwargs.weights_only: False runs code")
    assert model("my_package.Open", weights_only=True).taken == {"weights_only": True}
    assert model("my_package.Open", trust_remote_code=False).taken == {"trust_remote_code": False}
    assert not trusted_targets(["+model.trust_remote_code=false"])
    allowed = ["my_package.", *trusted_targets(["+model.trust_remote_code=true"])]
    assert model("my_package.Open", allowed, trust_remote_code=True).taken == {"trust_remote_code": True}


def test_a_missing_package_of_an_extra_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert refusal("peft.get_peft_model", ()) == (
        "model._target_: peft.get_peft_model needs the package peft: pip install -c constraints.txt -e '.[peft]'"
    )
