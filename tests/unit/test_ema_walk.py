"""One parameter has one name under every wrapper, and an average tracks exactly what its settings choose.

The names are those that torch.compile, activation checkpointing and DataParallel put into `named_parameters()`.
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ema import EMAConfig, ExponentialMovingAverage
from ema.names import canonical
from ema.walk import Walk
from tests.makers import Tied, averaged


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))


def checkpointed(model: nn.Sequential) -> nn.Module:
    model[0] = checkpoint_wrapper(model[0])
    return model


WRAPS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "plain": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),  # type: ignore[return-value]
    "data_parallel": nn.DataParallel,
    "checkpointed": checkpointed,
    "nested": lambda model: nn.DataParallel(torch.compile(checkpointed(model), backend="eager")),  # type: ignore[arg-type]
}


@torch.no_grad()
def add_one(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.add_(1)


@pytest.mark.parametrize("used", WRAPS)
@pytest.mark.parametrize("made", WRAPS)
def test_wrappers_mean_the_same_parameter_everywhere(made: str, used: str) -> None:
    """In construction, update, swap, copy and load: a name that is silently skipped freezes the average."""
    average = ExponentialMovingAverage(WRAPS[made](block()), EMAConfig(decay=0.0))
    other = WRAPS[used](block())
    average.update(other, iteration=0)
    add_one(other)
    average.update(other, iteration=1)
    state = average.state_dict()
    assert [name for name in state if not name.startswith("_ema")] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    ]
    for name, parameter in other.named_parameters():
        assert torch.equal(state[canonical(name)], parameter)
    with average.swapped_into(other):
        assert all(torch.equal(state[canonical(name)], p) for name, p in other.named_parameters())
    target = WRAPS[used](block())
    average.copy_to(target)
    assert all(torch.equal(state[canonical(name)], p) for name, p in target.named_parameters())
    average.load_state_dict(
        {f"module._orig_mod.{name}": value for name, value in state.items() if "_ema" not in name}
    )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: nn.Linear(3, 3), "the model lacks '0.weight'"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), "the model lacks '1.weight', '1.bias'"),
        (lambda: block().append(nn.Linear(2, 2)), "the model has unexpected '2.weight', '2.bias'"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)), r"'1.weight': expected shape \(2, 3\)"),
    ],
)
def test_a_model_of_other_parameters_is_refused_and_changes_nothing(
    other: Callable[[], nn.Module], message: str
) -> None:
    """Paired by position or skipped by name, an average would go on with a part of itself."""
    model = block()
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5))
    average.update(model, iteration=0)
    before = average.state_dict(snapshot=True)
    with pytest.raises((KeyError, ValueError), match=message):
        average.update(other(), iteration=1)
    assert all(torch.equal(value, before[name]) for name, value in average.state_dict().items())
    average.update(model, iteration=1)


def test_wrappers_put_on_and_off_do_not_make_a_new_walk() -> None:
    model = block()
    walk = Walk(model)
    walk.follow(nn.DataParallel(torch.compile(model, backend="eager")), "test")  # type: ignore[arg-type]
    walk.refresh()
    assert walk.version == 1


def test_buffers_that_are_views_of_the_same_elements_do_not_make_a_new_walk_at_each_update() -> None:
    model = block()
    model.register_buffer("table", torch.zeros(3))
    model.register_buffer("same", model.table.view(3))
    walk = Walk(model)
    walk.refresh()
    assert walk.version == 1
    model.same = torch.zeros(3)
    walk.refresh()
    assert walk.version == 2 and {"table", "same"} <= {slot.name for slot in walk.slots()}


class HasModule(nn.Module):
    """A user's own submodule called `module` beside others."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.module(x))


def test_a_submodule_that_is_called_module_works_consistently() -> None:
    live, target = HasModule(), HasModule()
    average = ExponentialMovingAverage(live, EMAConfig(decay=0.0))
    average.update(live, iteration=0)
    add_one(live)
    average.update(nn.DataParallel(live), iteration=1)
    average.copy_to(target)
    assert torch.equal(target.module.weight, live.module.weight)
    state = {name: value for name, value in average.state_dict().items() if not name.startswith("_ema")}
    target.load_state_dict(state)
    x = torch.randn(2, 2)
    with average.swapped_into(live):
        assert torch.equal(torch.func.functional_call(live, state, (x,)), live(x))
    earlier = {canonical(name): torch.full_like(value, 7) for name, value in state.items()}
    for saved in (live.state_dict(), nn.DataParallel(live).state_dict(), earlier):
        average.load_state_dict(saved)
    assert torch.equal(average.state_dict()["module.weight"], torch.full((2, 2), 7.0))


class OnlyModule(nn.Module):
    """A module of the user that looks like a wrapper."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.module = inner


def test_only_the_type_of_a_module_makes_it_a_wrapper() -> None:
    inner = nn.Linear(2, 2)
    for key in ("module", "_orig_mod", "_checkpoint_wrapped_module"):
        model = nn.Sequential()
        model.add_module(key, inner)
        assert Walk(model).by_name.keys() == {f"{key}.weight", f"{key}.bias"}
    model = nn.DataParallel(OnlyModule(checkpoint_wrapper(OnlyModule(inner))))
    assert Walk(model).by_name.keys() == {"module.module.weight", "module.module.bias"}


def test_a_state_with_names_of_wrappers_and_of_submodules_called_module_loads_exactly() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2))
    model.module = nn.Module()
    model.module.weight = nn.Parameter(torch.ones(2))
    average = ExponentialMovingAverage(model, EMAConfig())
    for saved in (model, nn.DataParallel(model), nn.DataParallel(torch.compile(model, backend="eager"))):  # type: ignore[arg-type]
        average.load_state_dict(saved.state_dict())
        assert torch.equal(average.state_dict()["weight"], torch.zeros(2))
        assert torch.equal(average.state_dict()["module.weight"], torch.ones(2))


def test_tied_weights_are_averaged_once_and_published_under_every_name() -> None:
    """Applied twice, decay 0.9 would act as 0.81."""
    model = Tied()
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.9))
    average.update(model, iteration=0)
    before = model.head.weight.detach().clone()
    add_one(model)
    average.update(model, iteration=1)
    state = average.state_dict()
    torch.testing.assert_close(state["embed.weight"], before + 0.1)
    assert state["head.weight"] is state["embed.weight"]
    for target in (Tied(), Tied(tie=False)):
        average.copy_to(target)
        assert torch.equal(target.head.weight, state["head.weight"])
        assert torch.equal(target.embed.weight, state["head.weight"])
    with average.swapped_into(model):
        assert model.head.weight is model.embed.weight
        assert torch.equal(model.head.weight, state["head.weight"])
    torch.testing.assert_close(model.head.weight.detach(), before + 1)


def test_a_module_used_twice_is_averaged_once() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.9))
    average.update(model, iteration=0)
    before = shared.weight.detach().clone()
    add_one(model)
    average.update(model, iteration=1)
    state = average.state_dict()
    torch.testing.assert_close(state["2.weight"], before + 0.1)
    assert set(model.state_dict()) <= set(state)


def test_untying_after_construction_is_refused() -> None:
    model = Tied()
    average = ExponentialMovingAverage(model, EMAConfig())
    model.head.weight = nn.Parameter(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="were tied when the average was made"):
        average.update(model, iteration=0)


def test_an_untied_average_does_not_go_into_a_tied_target() -> None:
    average = ExponentialMovingAverage(Tied(tie=False), EMAConfig())
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="tied in the target but not in the average"),
    ):
        average.copy_to(Tied())


def test_non_persistent_buffers_are_not_exported() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("table", torch.zeros(3), persistent=False)
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    assert "table" not in average.state_dict()
    target = nn.Linear(2, 2)
    target.register_buffer("table", torch.ones(3), persistent=False)
    average.copy_to(target)
    assert target.table.tolist() == [1, 1, 1]


def test_a_parameter_that_is_trained_later_is_refused_by_name() -> None:
    """It would be published with its live values for ever, beside averages of all others."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    model[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'0.weight' was frozen .* expected track_frozen=True"):
        average.update(model, iteration=1)
    left_out = ExponentialMovingAverage(model, EMAConfig(exclude=["0.*"]))
    left_out.update(model, iteration=0)


def test_frozen_parameters_are_published_live_and_tracked_only_when_asked() -> None:
    model = block()
    model[0].weight.requires_grad_(False)
    plain = ExponentialMovingAverage(model, EMAConfig(decay=1.0))
    tracking = ExponentialMovingAverage(model, EMAConfig(decay=1.0, track_frozen=True))
    for average in (plain, tracking):
        average.update(model, iteration=0)
    before = model[0].weight.detach().clone()
    add_one(model)
    assert "0.weight" not in plain.state_dict()
    for average, expected in ((plain, before + 1), (tracking, before)):
        average.update(model, iteration=1)
        target = block()
        average.copy_to(target)
        assert torch.equal(target[0].weight, expected)
        assert torch.equal(target[1].weight, average.state_dict()["1.weight"])
        with average.swapped_into(model):
            assert torch.equal(model[0].weight, expected)


@pytest.mark.parametrize(
    ("include", "exclude", "tracked"),
    [
        (["1.*"], [], {"1.weight", "1.bias"}),
        ([], ["*.bias"], {"0.weight", "1.weight"}),
        (["0.*", "1.*"], ["0.bias"], {"0.weight", "1.weight", "1.bias"}),
    ],
)
def test_patterns_choose_what_is_averaged(include: list[str], exclude: list[str], tracked: set[str]) -> None:
    model = block()
    average = ExponentialMovingAverage(
        nn.DataParallel(model), EMAConfig(decay=1.0, include=include, exclude=exclude)
    )
    average.update(model, iteration=0)
    add_one(model)
    average.update(model, iteration=1)
    state = average.state_dict()
    assert {name for name in state if not name.startswith("_ema")} == tracked
    target = block()
    average.copy_to(target)
    for name, value in target.state_dict().items():
        expected = state[name] if name in tracked else model.state_dict()[name]
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("field", ["include", "exclude", "average_buffers"])
def test_a_pattern_that_matches_nothing_is_refused(field: str) -> None:
    with pytest.raises(
        ValueError, match=rf"EMAConfig.{field}: pattern 'hed.\*' matches no name of the model"
    ):
        ExponentialMovingAverage(block(), EMAConfig(**{field: ["hed.*"]}))  # type: ignore[arg-type]


def test_a_model_with_nothing_to_average_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter to average"):
        ExponentialMovingAverage(block().requires_grad_(False), EMAConfig())
    with pytest.raises(ValueError, match="no parameter to average"):
        ExponentialMovingAverage(nn.Flatten(), EMAConfig())


def test_the_check_for_finite_weights_looks_at_what_is_averaged() -> None:
    model = nn.Linear(2, 2)
    model.mask = nn.Parameter(torch.full((2, 2), -torch.inf).triu(1), requires_grad=False)
    model.register_buffer("scale", torch.ones(1))
    average = averaged(model, EMAConfig(decay=0.5, check_finite=True, average_buffers=["scale"]))
    assert (average.num_updates, average.num_skipped) == (1, 0)
    model.scale.fill_(torch.inf)
    average.update(model, iteration=1)
    assert (average.num_updates, average.num_skipped) == (1, 1)
    assert average.state_dict()["scale"] == 1


class Embedded(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def test_two_values_of_one_tied_tensor_are_refused() -> None:
    average = ExponentialMovingAverage(Embedded(True), EMAConfig(decay=0.5))
    untied = averaged(Embedded(False)).state_dict()
    with pytest.raises(KeyError, match=r"embedding.weight.* and .*head.weight"):
        average.load_state_dict(untied)
    average.load_state_dict({**untied, "head.weight": untied["embedding.weight"].clone()})
    parameters = {name: nn.Parameter(value) for name, value in untied.items() if not name.startswith("_ema")}
    with pytest.raises(KeyError, match="are tied"):
        average.load_state_dict(parameters)
