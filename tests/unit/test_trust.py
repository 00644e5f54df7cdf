"""What a `_target_` may name. Nothing here may be called unless it is allowed."""

import sys

import pytest
from torch import nn

from tests.my_package import model, my_package, refusal  # noqa: F401 (an automatic fixture)
from trainer.config.trust import resolve_target, trusted_targets
from trainer.errors import ConfigError


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


def test_a_private_name_is_refused():
    assert "expected a dotted path of public names" in refusal("my_package._Private", width=1)


def test_a_misspelled_target_says_what_was_meant():
    assert (
        refusal("my_package.Nett", width=1) == "model._target_: 'my_package' has no 'Nett'; did you mean Net?"
    )
    other_case = (
        "model._target_: 'torch.nn' has no 'Paramter'; did you mean Parameter?"  # it has `parameter` too
    )
    assert refusal("torch.nn.Paramter") == other_case
    assert "there is no module 'my_packag'" in refusal("my_packag.Net", ("my_packag.",))
    assert "needs the module 'a_module_nobody_has'" in refusal("my_broken.Net", ("my_broken.",))


def test_a_file_that_cannot_be_imported_is_named():
    message = refusal("my_failing.Net", ("my_failing.",))
    assert message.startswith("model._target_: importing my_failing: ZeroDivisionError: division by zero (")


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
    assert trusted_targets(["logger.also=[csv,my_log.Csv]"]) == ["my_log.Csv"]
    allowed = ["my_package.", *trusted_targets(["+model.trust_remote_code=true"])]
    assert model("my_package.Open", allowed, trust_remote_code=True).taken == {"trust_remote_code": True}


def test_a_missing_package_of_an_extra_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert refusal("peft.get_peft_model", ()) == (
        "model._target_: peft.get_peft_model needs the package peft: pip install -c constraints.txt -e '.[peft]'"
    )
