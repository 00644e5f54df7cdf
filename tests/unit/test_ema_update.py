"""When and what an average absorbs. Numbers come from the recursion shadow = b * shadow + (1 - b) * live by hand."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import ema.update
from ema import EMABank, EMAConfig, ExponentialMovingAverage
from tests.makers import network, shake


def shadow(average: ExponentialMovingAverage, name: str) -> Tensor:
    return average.state_dict()[name]


def test_the_first_update_copies_the_live_weights_not_the_constructors() -> None:
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.9))
    shake(model)
    assert not average.started
    average.update(model, iteration=0)
    assert average.started and torch.equal(shadow(average, "0.weight"), model[0].weight)
    first = model[0].weight.detach().clone()
    shake(model)
    average.update(model, iteration=1)
    torch.testing.assert_close(shadow(average, "0.weight"), 0.9 * first + 0.1 * model[0].weight.detach())


def test_updates_before_start_iter_do_nothing_but_remember_the_iteration() -> None:
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.9, start_iter=3))
    for iteration in range(3):
        shake(model)
        average.update(model, iteration=iteration)
        assert (average.started, average.num_updates, average.last_iteration) == (False, 0, iteration)
    shake(model)
    average.update(model, iteration=3)
    assert average.started and torch.equal(shadow(average, "2.bias"), model[2].bias)


def test_a_start_that_was_jumped_over_happens_at_the_next_update() -> None:
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig(start_iter=3, type="power"))
    average.update(model, iteration=10)
    assert average.started
    shake(model)
    average.update(model, iteration=11)
    assert average.decay == 0, "the power rule counts from the initialisation"


@pytest.mark.parametrize("again", [5, 4, 0])
def test_the_same_iteration_twice_is_refused(again: int) -> None:
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5))
    average.update(model, iteration=5)
    before = average.state_dict(snapshot=True)
    shake(model)
    with pytest.raises(ValueError, match=f"more than the last one, 5, got {again}"):
        average.update(model, iteration=again)
    after = average.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_update_every_absorbs_only_then() -> None:
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.9, update_every=3, start_iter=1))
    for iteration in range(8):
        average.update(model, iteration=iteration)
    assert average.num_updates == 3, "iterations 1, 4 and 7"
    assert average.decay == pytest.approx(0.9**3)
    assert average.last_iteration == 7


@pytest.mark.parametrize(
    ("live", "kept", "stored"),
    [
        (torch.bfloat16, "float32", torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float32, "float16", torch.float16),
        (torch.float64, "float32", torch.float32),
        (torch.float64, None, torch.float64),
    ],
)
def test_parameters_are_averaged_in_the_chosen_dtype(
    live: torch.dtype, kept: str | None, stored: torch.dtype
) -> None:
    """Pieces and packs of the mixed path: tensors larger than, equal to and smaller than one piece of 131,072."""
    torch.manual_seed(0)
    model = nn.ParameterList(
        [nn.Parameter(torch.randn(n).to(live)) for n in (3, 131_072, 300_001, 0, 70_000, 70_000)]
    )
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.75, dtype=kept))
    average.update(model, iteration=0)
    expected = [p.detach().to(stored, copy=True) for p in model]
    shake(model)
    average.update(model, iteration=1)
    for index, before in enumerate(expected):
        found = shadow(average, str(index))
        assert found.dtype == stored
        torch.testing.assert_close(found, torch.lerp(before, model[index].detach().to(stored), 0.25))


def test_an_fp32_shadow_of_bf16_weights_moves_where_a_bf16_one_does_not() -> None:
    """(1 - b) * change is below half a unit of bf16 at decay 0.9999, and far above one of fp32."""
    model = nn.Linear(8, 8).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1)
    averages = [ExponentialMovingAverage(model, EMAConfig(dtype=dtype)) for dtype in ("float32", "bfloat16")]
    for average in averages:
        average.update(model, iteration=0)
    with torch.no_grad():
        model.weight.fill_(1.5)
    for average in averages:
        for iteration in range(1, 101):
            average.update(model, iteration=iteration)
    wide, low = (shadow(average, "weight") for average in averages)
    torch.testing.assert_close(wide, torch.full((8, 8), 1.5 - 0.5 * 0.9999**100), rtol=0, atol=1e-5)
    assert torch.equal(low.float(), torch.ones(8, 8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_formats_that_are_not_contiguous_are_averaged_right(dtype: str) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(64, 300, 3).to(memory_format=torch.channels_last)
    model.strided = nn.Parameter(torch.randn(400, 800)[:, ::2])
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5, dtype=dtype))
    average.update(model, iteration=0)
    before = {
        name: p.detach().to(shadow(average, name).dtype, copy=True) for name, p in model.named_parameters()
    }
    shake(model)
    average.update(model, iteration=1)
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            shadow(average, name), torch.lerp(before[name], p.detach().to(before[name].dtype), 0.5)
        )


def test_buffers_are_copied_exactly_in_their_own_dtype() -> None:
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.9, dtype="bfloat16"))
    for iteration in range(3):
        model(torch.randn(5, 3))
        average.update(model, iteration=iteration)
    assert shadow(average, "1.num_batches_tracked").dtype == torch.int64
    assert shadow(average, "1.num_batches_tracked").item() == 3
    assert torch.equal(shadow(average, "1.running_mean"), model[1].running_mean)
    assert shadow(average, "1.running_mean").dtype == torch.float32


def test_integer_and_bool_buffers_survive_large_values() -> None:
    """2**53 + 1 is not a float64: an average through floats would lose it."""
    model = nn.Linear(2, 2)
    model.register_buffer("count", torch.tensor(2**53 + 1))
    model.register_buffer("mask", torch.tensor([True, False]))
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5, average_buffers=["*"]))
    average.update(model, iteration=0)
    model.count += 2
    model.mask = ~model.mask
    average.update(model, iteration=1)
    assert shadow(average, "count").item() == 2**53 + 3
    assert shadow(average, "mask").tolist() == [False, True]


def test_chosen_float_buffers_are_averaged() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("expert_bias", torch.zeros(3))
    model.register_buffer("scale", torch.zeros(3))
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.75, average_buffers=["expert_*"]))
    average.update(model, iteration=0)
    model.expert_bias = torch.ones(3)
    model.scale = torch.ones(3)
    average.update(model, iteration=1)
    assert shadow(average, "expert_bias").tolist() == [0.25] * 3
    assert shadow(average, "scale").tolist() == [1.0] * 3


def test_a_step_that_was_not_taken_leaves_the_shadow_and_is_counted() -> None:
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.9))
    for iteration in range(2):
        shake(model)
        average.update(model, iteration=iteration)
    before = average.state_dict(snapshot=True)
    with torch.no_grad():
        model[1].running_mean.fill_(float("nan"))
    average.update(model, iteration=2, finite=False)
    average.update(model, iteration=3, finite=torch.tensor(False))
    after = average.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith("_ema"))
    assert (average.num_updates, average.num_skipped, average.last_iteration) == (2, 2, 3)


def test_a_skipped_step_is_an_update_with_beta_one() -> None:
    """Iterations go on counting: at t = 3 the power rule weighs as at t = 3, not as at the second update."""
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig(type="power", gamma=1.0))
    average.update(model, iteration=0)
    average.update(model, iteration=1)
    before = shadow(average, "0.weight").clone()
    average.update(model, iteration=2, finite=False)
    shake(model)
    average.update(model, iteration=3)
    expected = torch.lerp(before, model[0].weight.detach(), 1 - (1 - 1 / 3) ** 2)
    torch.testing.assert_close(shadow(average, "0.weight"), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_flag_on_the_device_gives_what_a_flag_on_the_host_gives(
    monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """The path that never waits for the device, run here with CPU tensors."""
    config = EMAConfig(decay=0.9, dtype=dtype, average_buffers=["*.running_*"], update_every=2)
    flags = [True, True, True, False, False, True, True, True]
    host, device = network(seed=3), network(seed=3)
    by_host = ExponentialMovingAverage(host, config)
    by_device = ExponentialMovingAverage(device, config)
    for iteration, flag in enumerate(flags):
        torch.manual_seed(iteration)
        host(torch.randn(6, 3)), shake(host)
        torch.manual_seed(iteration)
        device(torch.randn(6, 3)), shake(device)
        if not flag:
            with torch.no_grad():
                device[1].running_mean.fill_(float("nan"))
        by_host.update(host, iteration=iteration, finite=flag)
        with monkeypatch.context() as patch:
            patch.setattr(ema.update, "step_flag", lambda finite: torch.tensor(finite))
            by_device.update(device, iteration=iteration, finite=flag)
        device.load_state_dict(host.state_dict())
    left, right = by_host.state_dict(snapshot=True), by_device.state_dict(snapshot=True)
    assert torch.equal(left["_ema.counters"], right["_ema.counters"])
    assert by_device.num_skipped == 2
    by_host.load_state_dict(by_device.state_dict())
    by_device.load_state_dict(by_host.state_dict())
    assert (by_device.num_skipped, by_device.num_updates) == (2, by_host.num_updates), (
        "counted once, not again"
    )
    tolerance = 1e-6 if dtype == "float32" else 2e-2
    for name, value in left.items():
        torch.testing.assert_close(right[name].double(), value.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_gain_behind_a_flag_on_the_device_is_not_rounded_to_the_default_dtype(
    monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """1e-4 is 1.0014e-4 in bfloat16, and off by 2.5e-8 of itself in float32."""
    monkeypatch.setattr(ema.update, "step_flag", lambda finite: torch.tensor(finite))
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.9999, dtype=dtype))
    torch.set_default_dtype(torch.bfloat16)
    try:
        average.update(model, iteration=0)
        nn.init.ones_(model.weight)
        average.update(model, iteration=1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert shadow(average, "weight").item() == pytest.approx(
        1 - 0.9999, rel=1e-7 if dtype == "float32" else 1e-15
    )


def test_the_host_does_not_wait_for_the_flag_when_the_weights_were_converted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ema.update, "step_flag", lambda finite: torch.tensor(finite))
    model = nn.BatchNorm1d(2)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5))
    average.update(model, iteration=0)
    model.weight.data = model.weight.data.to(torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__bool__", lambda flag: pytest.fail("the host waits for the device"))
        average.update(model, iteration=1)
    assert average.num_updates == 2
    model.register_buffer("running_mean", torch.ones(3))
    average.update(model, iteration=2, finite=False)
    assert shadow(average, "running_mean").shape == (2,)


def test_finite_must_be_one_flag() -> None:
    model = network(seed=3)
    with pytest.raises(TypeError, match="a bool or a plain scalar tensor"):
        ExponentialMovingAverage(model, EMAConfig()).update(model, iteration=0, finite=torch.ones(2))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_check_finite_does_not_absorb_a_broken_step(poison: float) -> None:
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.9, check_finite=True))
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model[2].bias[0] = poison
    average.update(model, iteration=0)
    assert not average.started, "a broken step is no start either"
    model.load_state_dict(whole, strict=False)
    average.update(model, iteration=1)
    with torch.no_grad():
        model[2].bias[0] = poison
    average.update(model, iteration=2)
    assert (average.started, average.num_updates, average.num_skipped) == (True, 1, 2)
    assert all(torch.equal(shadow(average, name), value) for name, value in whole.items())


def test_check_finite_looks_at_complex_parameters() -> None:
    model = nn.ParameterDict({"a": torch.ones(2, dtype=torch.complex64)})
    average = ExponentialMovingAverage(model, EMAConfig(check_finite=True))
    average.update(model, iteration=0)
    with torch.no_grad():
        model["a"][1] = complex(0, float("nan"))
    average.update(model, iteration=1)
    assert average.num_skipped == 1 and shadow(average, "a").isfinite().all()


def test_without_check_finite_nothing_is_looked_at() -> None:
    model = network(seed=3)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.9))
    with torch.no_grad():
        model[2].bias[0] = float("nan")
    average.update(model, iteration=0)
    assert average.started and average.num_skipped == 0


def test_a_meta_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'0.weight': expected a tensor with storage"):
        ExponentialMovingAverage(network(seed=3).to("meta"), EMAConfig())


def test_a_rule_named_without_its_callable_is_refused() -> None:
    with pytest.raises(ValueError, match=r"EMAConfig.rule: expected the callable .* 'mine.slow', got None"):
        ExponentialMovingAverage(network(seed=3), EMAConfig(rule="mine.slow"))


def test_the_reference_loop_runs_unchanged() -> None:
    """Constructor, update, copy_to, state_dict and load_state_dict as code against Model-Optimizer calls them."""
    student, copy = network(seed=3), network(seed=3)
    average = ExponentialMovingAverage(student, EMAConfig(decay=0.9, start_iter=1))
    for step in range(4):
        shake(student)
        average.update(student, iteration=step)
    average.copy_to(copy)
    assert torch.equal(copy[0].weight, shadow(average, "0.weight"))
    other = ExponentialMovingAverage(student, EMAConfig(decay=0.9, start_iter=1))
    other.load_state_dict(average.state_dict())
    assert torch.equal(shadow(other, "0.weight"), shadow(average, "0.weight"))


def test_a_bank_is_its_averages_one_by_one() -> None:
    configs = {
        "constant": EMAConfig(decay=0.9),
        "late": EMAConfig(type="warmup", decay=0.99, start_iter=3),
        "rare": EMAConfig(decay=0.9, update_every=2, dtype="bfloat16"),
        "part": EMAConfig(type="power", include=["0.*"], dtype=None),
    }
    together, alone = network(seed=3).bfloat16(), network(seed=3).bfloat16()
    bank = EMABank(together, configs)
    averages = {name: ExponentialMovingAverage(alone, config) for name, config in configs.items()}
    for iteration in range(7):
        torch.manual_seed(iteration)
        shake(together)
        bank.update(together, iteration=iteration)
        alone.load_state_dict(together.state_dict())
        for average in averages.values():
            average.update(alone, iteration=iteration)
    assert list(bank) == list(configs) and len(bank) == 4
    for name, average in bank.items():
        expected = averages[name].state_dict()
        found = average.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


def test_an_empty_bank_does_nothing() -> None:
    model = network(seed=3)
    bank = EMABank(model, {})
    bank.update(model, iteration=0)
    assert len(bank) == 0 and bank.state_dict() == {}
    bank.load_state_dict({})


def test_names_of_a_bank_are_checked() -> None:
    with pytest.raises(ValueError, match="a name without '/', got 'a/b'"):
        EMABank(network(seed=3), {"a/b": EMAConfig()})
    with pytest.raises(ValueError, match="got one for 'b'"):
        EMABank(network(seed=3), {"a": EMAConfig()}, rules={"b": lambda t, config: 0.5})


def test_nothing_is_allocated_by_an_update_after_the_first_two() -> None:
    """Counted by the profiler on the operator level: empty, copies and results of out-of-place operators."""
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)], nn.BatchNorm1d(64))
    bank = EMABank(model, {"same": EMAConfig(decay=0.9), "low": EMAConfig(decay=0.9, dtype="bfloat16")})
    for iteration in range(2):
        bank.update(model, iteration=iteration)
    with torch.profiler.profile(profile_memory=True) as profiler:
        bank.update(model, iteration=2)
    assert sum(max(0, event.self_cpu_memory_usage) for event in profiler.key_averages()) == 0


def test_no_warning_is_raised_by_ordinary_use() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = network(seed=3)
        average = ExponentialMovingAverage(model, EMAConfig(decay=0.9))
        average.update(model, iteration=0)
        with average.swapped_into(model):
            model(torch.randn(4, 3))
        average.load_state_dict(average.state_dict())
        average.copy_to(network(seed=3))
