"""Saving, loading and publishing: strict, atomic, whole. Expected values are the tensors themselves."""

import copy
import io
import json
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from ema import EMABank, EMAConfig, ExponentialMovingAverage
from tests.makers import assert_same, network, shake


def trained(
    config: EMAConfig | None = None, steps: int = 4
) -> tuple[nn.Sequential, ExponentialMovingAverage]:
    model = network()
    average = ExponentialMovingAverage(model, config or EMAConfig(decay=0.9))
    for step in range(steps):
        shake(model)
        model(torch.randn(6, 3))
        average.update(model, iteration=step, finite=step != 2)
    return model, average


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def test_counters_and_rule_are_part_of_the_state_as_tensors() -> None:
    _, average = trained(EMAConfig(decay=0.9, start_iter=1))
    state = average.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    assert state["_ema.counters"].tolist() == [1, 2, 1, 1, 3]
    rule = state["_ema.rule"]
    assert (rule.dtype, rule.shape) == (torch.uint8, (1024,))
    assert json.loads(bytes(rule.tolist()))["decay"] == 0.9


def test_a_saved_average_is_read_with_weights_only() -> None:
    model, average = trained()
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    other = ExponentialMovingAverage(model, average.config)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(other.state_dict(), average.state_dict())
    assert (other.num_updates, other.num_skipped, other.last_iteration, other.decay) == (
        3,
        1,
        3,
        average.decay,
    )


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copied_or_pickled_average_goes_on_like_the_first(
    twin_of: Callable[[Any], Any], dtype: torch.dtype
) -> None:
    """A pickle parts views from what they are views of, and an update writes through views."""
    model = network().to(dtype)
    bank = EMABank(model, {"a": EMAConfig(decay=0.5), "b": EMAConfig(type="power")})
    for step in range(2):
        bank.update(model, iteration=step)
    twin, twin_model = twin_of((bank, model))
    shake(model)
    twin_model.load_state_dict(model.state_dict())
    for one, its_model in ((bank, model), (twin, twin_model)):
        one.update(its_model, iteration=2)
    assert_same(bank.state_dict(), twin.state_dict())


def test_a_resumed_average_is_never_started_again() -> None:
    config = EMAConfig(decay=0.9, start_iter=3)
    model, average = trained(config)
    other = ExponentialMovingAverage(model, config)
    other.load_state_dict(average.state_dict())
    before = other.state_dict(snapshot=True)
    shake(model)
    with pytest.raises(ValueError, match="more than the last one, 3, got 3"):
        other.update(model, iteration=3)
    other.update(model, iteration=4)
    expected = torch.lerp(before["0.weight"], model[0].weight.detach(), 0.1)
    torch.testing.assert_close(other.state_dict()["0.weight"], expected)


def test_a_snapshot_does_not_follow_and_the_state_does() -> None:
    model, average = trained()
    alias, snapshot = average.state_dict(), average.state_dict(snapshot=True)
    before = copied(alias)
    average.update(model, iteration=9)
    assert torch.equal(snapshot["0.weight"], before["0.weight"])
    assert not torch.equal(alias["0.weight"], before["0.weight"])
    assert alias["0.weight"] is average.state_dict()["0.weight"]


@pytest.mark.parametrize("form", ["flat", "nested", "stateful"])
def test_dcp_keeps_the_counters_in_every_form_of_saving(form: str, tmp_path: Any) -> None:
    """DCP stores entries and loads them in place: what else a dict holds would be that of the new average."""

    def made(one: ExponentialMovingAverage) -> dict[str, Any]:
        state = {"ema": one} if form == "stateful" else {"ema": one.state_dict()}
        return one.state_dict() if form == "flat" else state

    model, average = trained()
    dcp.save(made(average), checkpoint_id=tmp_path, no_dist=True)
    other = ExponentialMovingAverage(network(), average.config)
    state = made(other)
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    if form != "stateful":
        other.load_state_dict(state if form == "flat" else state["ema"])
    assert (other.started, other.num_updates, other.num_skipped, other.last_iteration) == (True, 3, 1, 3)
    assert_same(other.state_dict(), average.state_dict())
    shake(model)
    for one in (average, other):
        one.update(model, iteration=4)
    assert_same(other.state_dict(), average.state_dict())


def test_a_plain_module_loads_the_state_without_the_reserved_keys_strictly() -> None:
    _, average = trained()
    plain, state = network(), average.state_dict()
    assert set(state) - set(plain.state_dict()) == {"_ema.counters", "_ema.rule"}
    plain.load_state_dict({name: value for name, value in state.items() if name in plain.state_dict()})
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_a_plain_dict_of_another_implementation_loads_as_started() -> None:
    """Model-Optimizer saves all named parameters and buffers, frozen and non-persistent ones too, and no counters."""
    model = network()
    model[0].bias.requires_grad_(False)
    model.register_buffer("table", torch.zeros(3), persistent=False)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.9, start_iter=100))
    plain = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    plain |= {name: torch.ones_like(b) for name, b in model.named_buffers()}
    average.load_state_dict(plain)
    assert average.started and average.last_iteration == -1
    assert torch.equal(average.state_dict()["2.weight"], plain["2.weight"])
    average.update(model, iteration=50)
    expected = torch.lerp(plain["2.weight"], model[2].weight.detach(), 0.1)
    torch.testing.assert_close(average.state_dict()["2.weight"], expected)
    average.update(model, iteration=100)
    assert average.num_updates == 2, "no second start at start_iter"


def test_a_plain_dict_is_updated_at_each_interval_also_before_a_late_start() -> None:
    model = network()
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.9, start_iter=100, update_every=4))
    average.load_state_dict({name: torch.ones_like(value) for name, value in model.state_dict().items()})
    for iteration in range(40):
        average.update(model, iteration=iteration)
    assert average.num_updates == 9


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", ["power", "debiased"])
def test_a_plain_dict_that_the_rule_replaces_at_once_is_a_warning(name: str, every: int) -> None:
    model, config = network(), EMAConfig(type=name, decay=0.9, update_every=every)
    plain = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    for first in (0, 1):
        average = ExponentialMovingAverage(model, config)
        average.load_state_dict(plain)
        due = first if every == 1 else every
        with pytest.warns(UserWarning, match=f"replaces it by the live weights; .* got {due}") as caught:
            for iteration in range(first, 5):
                average.update(model, iteration=iteration)
        assert [warning.filename for warning in caught] == [__file__]
        assert torch.equal(average.state_dict()["2.weight"], model[2].weight)
    average.load_state_dict(plain)
    of_live = ExponentialMovingAverage(model, EMAConfig(decay=0))
    of_live.load_state_dict(plain)
    with warnings.catch_warnings(action="error"):
        average.update(model, iteration=501)
        of_live.update(model, iteration=1)
    assert not torch.equal(average.state_dict()["2.weight"], model[2].weight)


def test_settings_that_the_user_changes_later_have_no_effect() -> None:
    model, config = network(), EMAConfig(decay=0.5)
    bank = EMABank(model, {"x": config, "y": config})
    config.decay = 1.5
    assert [average.config.decay for average in bank.values()] == [0.5, 0.5]
    assert bank["x"].config is not bank["y"].config


def test_an_average_with_a_sparse_buffer_is_copied_and_pickled() -> None:
    model = network()
    model.register_buffer("links", torch.eye(3).to_sparse())
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5))
    average.update(model, iteration=0)
    for copied in (copy.deepcopy(average), pickle.loads(pickle.dumps(average))):
        assert copied.state_dict()["links"].to_dense().equal(torch.eye(3))


def test_a_pickle_holds_each_tensor_once() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(50)))
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5))
    before = len(pickle.dumps(average))
    average.update(model, iteration=0)
    content = pickle.dumps(average)
    assert len(content) < 1.1 * before
    assert_same(pickle.loads(content).state_dict(), average.state_dict())


def without(key: str) -> Any:
    return lambda state: {name: value for name, value in state.items() if name != key}


def with_value(key: str, value: Any) -> Any:
    return lambda state: state | {key: value}


BREAKAGES: list[tuple[Any, type[Exception], str]] = [
    (without("2.bias"), KeyError, "lacks '2.bias'"),
    (without("1.running_var"), KeyError, "lacks '1.running_var'"),
    (lambda state: {}, KeyError, "lacks '0.weight'"),
    (with_value("3.bias", torch.zeros(2)), KeyError, "unexpected '3.bias'"),
    (with_value("2.bias", torch.zeros(1)), ValueError, r"'2.bias': expected shape \(2,\), got \(1,\)"),
    (with_value("2.bias", torch.zeros(2, dtype=torch.int64)), ValueError, "'2.bias': expected a tensor like"),
    (with_value("2.bias", [0, 0]), ValueError, "'2.bias': expected a tensor, got list"),
    (with_value("2.bias", torch.zeros(2, device="meta")), ValueError, "'2.bias': expected values"),
    (with_value("module.2.bias", torch.zeros(2)), KeyError, "two values of '2.bias'"),
    (with_value("_ema.counters", torch.zeros(4, dtype=torch.int64)), ValueError, "'_ema.counters'"),
    (with_value("_ema.counters", torch.tensor([7, 0, 0, 0, 0])), ValueError, "'_ema.counters'"),
    (with_value("_ema.rule", torch.zeros(1024, dtype=torch.uint8)), ValueError, "'_ema.rule': expected JSON"),
]


@pytest.mark.parametrize(("breakage", "error", "message"), BREAKAGES)
def test_a_failed_load_names_the_key_and_changes_nothing(
    breakage: Any, error: type[Exception], message: str
) -> None:
    _, average = trained()
    other_state = copied(trained()[1].state_dict())
    before = average.state_dict(snapshot=True)
    with pytest.raises(error, match=message):
        average.load_state_dict(breakage(other_state))
    assert_same(average.state_dict(), before)


def test_a_failed_load_changes_no_average_of_a_bank() -> None:
    configs = {"a": EMAConfig(decay=0.9), "b": EMAConfig(decay=0.5)}
    models = network(), network()
    bank, source = (EMABank(model, configs) for model in models)
    bank.update(models[0], iteration=0)
    source.update(models[1], iteration=0)
    state = source.state_dict(snapshot=True)
    state["b/2.bias"] = torch.zeros(1)
    before = bank.state_dict(snapshot=True)
    with pytest.raises(ValueError, match=r"average 'b': '2\.bias'"):
        bank.load_state_dict(state)
    assert_same(bank.state_dict(), before)
    for wrong in ("c/2.bias", "2.bias"):
        with pytest.raises(KeyError, match=f"unexpected '{wrong}'"):
            bank.load_state_dict({**source.state_dict(), wrong: torch.zeros(2)})


def test_a_bank_round_trips() -> None:
    configs = {"a": EMAConfig(decay=0.9), "b": EMAConfig(type="power", start_iter=2)}
    model = network()
    bank, other = EMABank(model, configs), EMABank(network(), configs)
    for step in range(2):
        shake(model)
        bank.update(model, iteration=step)
    other.load_state_dict(bank.state_dict())
    assert_same(
        other.state_dict(), bank.state_dict() | {k: v for k, v in other.state_dict().items() if k[0] == "b"}
    )
    assert (other["a"].started, other["b"].started, other["b"].last_iteration) == (True, False, 1)


def test_another_rule_than_the_saved_one_gives_a_warning() -> None:
    model, average = trained()
    other = ExponentialMovingAverage(model, EMAConfig(decay=0.99, update_every=2))
    with pytest.warns(UserWarning, match=r"decay 0.9 -> 0.99, update_every 1 -> 2"):
        other.load_state_dict(average.state_dict())


def test_tied_weights_load_from_any_of_their_names() -> None:
    def tied() -> nn.Module:
        model = nn.Module()
        model.one = nn.Linear(2, 2, bias=False)
        model.two = nn.Linear(2, 2, bias=False)
        model.two.weight = model.one.weight
        return model

    average = ExponentialMovingAverage(tied(), EMAConfig())
    for name in ("one.weight", "two.weight"):
        value = torch.randn(2, 2)
        average.load_state_dict({name: value})
        assert torch.equal(average.state_dict()["one.weight"], value)


def test_before_the_start_the_live_weights_are_published_with_a_warning() -> None:
    """Constructor weights there gave metrics near zero (Lightning#21724)."""
    model = network()
    average = ExponentialMovingAverage(model, EMAConfig(start_iter=100))
    shake(model)
    average.update(model, iteration=0)
    target = network()
    with pytest.warns(UserWarning, match=r"copy_to: the average has not started \(start_iter=100\)"):
        average.copy_to(target)
    assert_same(dict(target.state_dict()), dict(model.state_dict()))
    assert torch.equal(average.state_dict()["0.weight"], model[0].weight)
    live = copied(dict(model.state_dict()))
    with (
        pytest.warns(UserWarning, match="swapped_into: the average has not started"),
        average.swapped_into(model),
    ):
        assert_same(dict(model.state_dict()), live)


class Renamed(nn.Module):
    def __init__(self, width: int = 4, more: bool = False, out: int = 2) -> None:
        super().__init__()
        self.add_module("0", nn.Linear(3, width))
        self.add_module("1", nn.BatchNorm1d(4))
        self.add_module("2", nn.Linear(4, out))
        if more:
            self.extra = nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (
            lambda: Renamed(more=True),
            KeyError,
            "the target model has unexpected 'extra.weight', 'extra.bias'",
        ),
        (lambda: nn.Linear(3, 4), KeyError, "the target model lacks '0.weight'"),
        (lambda: Renamed(width=1), ValueError, r"'0.weight': expected shape \(4, 3\), got \(1, 3\)"),
        (lambda: Renamed(out=1), ValueError, r"'2.weight': expected shape \(2, 4\), got \(1, 4\)"),
        (lambda: Renamed().to("meta"), ValueError, "'0.weight': expected a tensor with storage"),
    ],
)
def test_copy_to_is_strict_and_writes_nothing_before_all_is_checked(
    target: Any, error: Any, message: str
) -> None:
    _, average = trained()
    model = target()
    before = copied(dict(model.state_dict()))
    with pytest.raises(error, match=message):
        average.copy_to(model)
    assert all(
        value.is_meta or torch.equal(value, before[name]) for name, value in model.state_dict().items()
    )


def test_copy_to_casts_to_the_target_and_copies_buffers() -> None:
    model, average = trained()
    target = network().to(torch.bfloat16)
    average.copy_to(target)
    state = average.state_dict()
    assert torch.equal(target[0].weight, state["0.weight"].bfloat16())
    assert target[1].num_batches_tracked.item() == model[1].num_batches_tracked.item()


def test_copy_to_the_live_model_itself_publishes_in_place() -> None:
    model, average = trained()
    weight = model[0].weight
    average.copy_to(model)
    assert model[0].weight is weight and torch.equal(weight, average.state_dict()["0.weight"])


def test_another_length_of_the_run_is_named_where_the_rule_reads_it() -> None:
    model = network()

    def saved(**config: object) -> dict[str, torch.Tensor]:
        average = ExponentialMovingAverage(model, EMAConfig(**config), rule=lambda t, config: 0.5)  # type: ignore[arg-type]
        average.update(model, iteration=0)
        return average.state_dict(snapshot=True)

    def loaded(state: dict[str, torch.Tensor], **config: object) -> None:
        ExponentialMovingAverage(model, EMAConfig(**config), rule=lambda t, config: 0.5).load_state_dict(
            state
        )  # type: ignore[arg-type]

    own = {"_target_": "mine.rising", "steps": 3}
    state = saved(type="cosine", num_iterations=100)
    with pytest.warns(UserWarning, match="another rule: num_iterations 100 -> 200"):
        loaded(state, type="cosine", num_iterations=200)
    with pytest.warns(UserWarning, match=r"another rule: rule \{.*3\} -> \{.*4\}$"):
        loaded(saved(rule=own, num_iterations=5), rule={**own, "steps": 4}, num_iterations=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded(saved(num_iterations=100), num_iterations=200)
        loaded(state, type="cosine", num_iterations=100)
