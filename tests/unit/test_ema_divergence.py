"""Distances of averages and of a step from the live weights, against the definitions in float64.

The slopes over decays are those of the closed forms E|M - theta|^2, per element, for weights that move by iid
increments of mean m and variance v, m^2 b^2 (1-b^t)^2 / (1-b)^2 + v b^2 (1-b^2t) / (1-b^2), and for white noise around
a point, 2 v b^2 / (1+b); over D elements a squared distance has a relative standard error of sqrt(2/D).
"""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ema import EMABank, EMAConfig, ExponentialMovingAverage, divergence
from ema.distance import Divergence, block_name, drift_slope, live_copy
from tests.makers import averaged, shake


def network() -> nn.Module:
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
    model.head = nn.Linear(5, 2)
    return model


def flat(tensors: dict[str, torch.Tensor], prefix: str = "") -> torch.Tensor:
    return torch.cat(
        [t.detach().double().reshape(-1) for name, t in tensors.items() if name.startswith(prefix)]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_definition_whole_and_by_block(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    bank = EMABank(model, {"long": EMAConfig(decay=0.9), "low": EMAConfig(decay=0.5, dtype="bfloat16")})
    for step in range(5):
        shake(model)
        bank.update(model, iteration=step)
    found = divergence(bank, nn.DataParallel(model))
    for name, average in bank.items():
        state = {key: value for key, value in average.state_dict().items() if "_ema" not in key}
        live = dict(model.named_parameters())
        shadow, theta = flat(state), flat(live)
        assert found[name].rel_l2 == pytest.approx(float((shadow - theta).norm() / theta.norm()), rel=1e-6)
        assert found[name].cosine == pytest.approx(
            float(shadow @ theta / shadow.norm() / theta.norm()), rel=1e-6
        )
        assert found[name].decay == pytest.approx(average.config.decay)
        assert list(found[name].blocks) == ["blocks.0", "blocks.1", "blocks.2", "head"]
        for block, value in found[name].blocks.items():
            difference = flat(state, block) - flat(live, block)
            assert value == pytest.approx(float(difference.norm() / flat(live, block).norm()), rel=1e-6)


def test_the_cosine_does_not_cancel_where_the_average_is_close() -> None:
    """At an angle of 1e-6, 1 - cos = 5e-13: far below what a product of fp32 sums can show."""
    model = nn.Linear(1000, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(model.weight)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5, dtype=None))
    average.update(model, iteration=0)
    with torch.no_grad():
        model.weight[0, ::2] += 2e-6
        model.weight[0, 1::2] -= 2e-6
    average.update(model, iteration=1)
    found = divergence({"a": average}, model)["a"]
    assert found.rel_l2 == pytest.approx(1e-6, rel=1e-6)
    assert 1 - found.cosine == pytest.approx(0.5e-12, rel=1e-3)


def test_a_wrong_sign_shows_at_once() -> None:
    """A runaway shadow (ai-toolkit#1034) had a normal training loss; here it is a large rel_l2."""
    model = network()
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.9))
    average.update(model, iteration=0)
    average.load_state_dict({name: -12 * p.detach() for name, p in model.named_parameters()})
    found = divergence({"a": average}, model)["a"]
    assert found.rel_l2 == pytest.approx(13, rel=1e-6) and found.cosine == pytest.approx(-1)


def test_only_what_the_average_tracks_is_measured() -> None:
    model = network()
    bank = EMABank(model, {"head": EMAConfig(decay=0.5, include=["head.*"]), "all": EMAConfig(decay=0.5)})
    bank.update(model, iteration=0)
    shake(model)
    bank.update(model, iteration=1)
    found = divergence(bank, model, block_of=lambda name: name.split(".")[-1])
    assert set(found["head"].blocks) == {"weight", "bias"}
    assert found["head"].blocks["bias"] != found["all"].blocks["bias"]


def test_before_the_start_and_at_zero_it_stays_a_number() -> None:
    model = network()
    average = ExponentialMovingAverage(model, EMAConfig(start_iter=10))
    shake(model)
    found = divergence({"a": average}, model)["a"]
    assert (found.rel_l2, found.cosine, found.decay) == (0, 1, 0)
    nn.init.zeros_(model.head.bias)
    started = ExponentialMovingAverage(model.head, EMAConfig(include=["bias"], decay=1.0))
    started.update(model.head, iteration=0)
    assert divergence({"a": started}, model.head)["a"].rel_l2 == 0
    nn.init.ones_(model.head.bias)
    started.update(model.head, iteration=1)
    nn.init.zeros_(model.head.bias)
    started.load_state_dict({"bias": torch.ones(2)})
    assert divergence({"a": started}, model.head)["a"].rel_l2 == math.inf
    assert divergence({}, model) == {}


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("blocks.3.attention.weight", "blocks.3"),
        ("head.weight", "head"),
        ("theta", "theta"),
        ("layers.x.0.w", "layers"),
    ],
)
def test_blocks_are_named_by_their_number(name: str, block: str) -> None:
    assert block_name(name) == block


class Recorded(TorchDispatchMode):
    """Counts operations, and keeps the size of the largest tensor that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.calls.append(func.overloadpacket.__name__)
        if isinstance(out, Tensor) and not func.is_view:
            self.largest = max(self.largest, out.numel() * out.element_size())
        return out


def parameters(tensors: list[Tensor]) -> nn.Module:
    model = nn.Module()
    model.blocks = nn.ModuleList(
        nn.ParameterList(tensors[start : start + 7]) for start in range(0, len(tensors), 7)
    )
    return model


def moved(model: nn.Module, bank: EMABank) -> None:
    for iteration in range(3):
        bank.update(model, iteration=iteration)
        shake(model, 1e-3)


def reference(shadow: Tensor, live: Tensor) -> tuple[float, float]:
    wide = torch.complex128 if live.is_complex() else torch.float64
    shadow, live = shadow.to(wide).reshape(-1), live.detach().to(wide).reshape(-1)
    return float((shadow - live).norm()) ** 2, float(live.norm()) ** 2


def test_every_shape_size_and_dtype_is_summed_in_float64() -> None:
    """Squares of 1e-30 and 1e25 leave the range of float32; 150,001 elements are read in slices."""
    torch.manual_seed(0)
    tensors = [
        torch.randn(size) for size in ((), (1,), (129,), (0, 4), (3, 5, 7), (128,), (150_001,), (300, 300))
    ]
    tensors += [1e-30 * torch.randn(50), 1e25 * torch.randn(50), torch.randn(9, 3, dtype=torch.complex64)]
    tensors += [torch.randn(40).bfloat16(), torch.randn(40).double(), torch.randn(5, 4).t()]
    tensors += [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)]
    model = nn.ParameterDict({f"p{place}": tensor for place, tensor in enumerate(tensors)})
    bank = EMABank(model, {"a": EMAConfig(decay=0.9), "own": EMAConfig(decay=0.99, dtype=None)})
    moved(model, bank)
    found = divergence(bank, model)
    for name, average in bank.items():
        state = average.state_dict()
        for key, live in model.items():
            difference, norm = reference(state[key], live)
            expected = math.sqrt(difference / norm) if norm else 0.0
            assert found[name].blocks[key] == pytest.approx(expected, rel=1e-12), key
        pairs = [reference(state[key], live) for key, live in model.items()]
        total = [math.fsum(column) for column in zip(*pairs, strict=True)]
        assert found[name].rel_l2 == pytest.approx(math.sqrt(total[0] / total[1]), rel=1e-12)
        assert found[name].live_norm == pytest.approx(math.sqrt(total[1]), rel=1e-12)


def test_calls_do_not_grow_with_tensors_and_no_copy_of_the_model_is_made() -> None:
    counts = []
    for number in (20, 200):
        model = parameters([torch.randn(10 + place % 13) for place in range(number)])
        bank = EMABank(model, {"a": EMAConfig(), "b": EMAConfig(decay=0.9)})
        moved(model, bank)
        divergence(bank, model)
        with Recorded() as recorded:
            divergence(bank, model)
        counts.append(len([call for call in recorded.calls if call != "detach"]))
        # Of the live weights once, of each average and of each difference.
        assert recorded.calls.count("linalg_vector_norm") == 5
    assert counts[0] == counts[1] < 60
    model = parameters([torch.randn(1000, 1000), *(torch.randn(1000) for _ in range(1000))])
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    with Recorded() as recorded:
        divergence({"a": average}, model)
    assert recorded.largest < 3e6, "bytes; the model has 8e6"


def test_storage_that_was_swapped_behind_a_parameter_is_seen() -> None:
    model = parameters([torch.ones(30), torch.ones(200_000)])
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5, dtype="float32"))
    average.update(model, iteration=0)
    assert divergence({"a": average}, model)["a"].rel_l2 == 0
    for factor, dtype in ((2, torch.float32), (4, torch.float64)):
        for parameter in model.parameters():
            parameter.data = torch.full_like(parameter.data, factor, dtype=dtype)
        assert divergence({"a": average}, model)["a"].rel_l2 == pytest.approx(1 - 1 / factor)
    shape = model.blocks[0][0].shape
    model.blocks[0][0].data = torch.ones(1)
    with pytest.raises(ValueError, match=r"'blocks.0.0': expected shape \(1,\), got \(30,\)"):
        divergence({"a": average}, model)
    model.blocks[0][0].data = torch.ones(shape)
    divergence({"a": average}, model)


def test_a_broken_weight_is_not_mistaken_for_no_distance() -> None:
    model = network()
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    nn.init.constant_(model.head.bias, math.nan)
    found = divergence({"a": average}, model)["a"]
    assert math.isnan(found.rel_l2) and math.isnan(found.cosine) and math.isnan(found.blocks["head"])
    assert found.blocks["blocks.0"] == 0


def test_the_length_of_a_step_is_measured_with_the_averages_or_alone() -> None:
    """SGD moves every weight by lr * gradient: |update| = 0.5 * |gradient|."""
    model = network()
    model.blocks[0].requires_grad_(False)
    for bank in (EMABank(model, {"a": EMAConfig(decay=0.5)}), EMABank(model, {})):
        bank.update(model, iteration=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        before = live_copy(bank, model)
        unmoved = divergence({"step": before}, model)["step"]
        assert (unmoved.rel_l2, unmoved.horizon, unmoved.decay) == (0, None, 0)
        optimizer.step()
        found = divergence({**bank, "step": before}, model)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradient = flat({name: p.grad for name, p in trained.items()})  # type: ignore[misc]
        assert found["step"].rel_l2 == pytest.approx(
            float(0.5 * gradient.norm() / flat(trained).norm()), rel=1e-6
        )
        assert "blocks.0" not in found["step"].blocks and list(found) == [*bank, "step"]
        # The average was set to the weights before the step, so it is as far away as those.
        assert all(found[name].rel_l2 == pytest.approx(found["step"].rel_l2, rel=1e-6) for name in bank)


def test_updates_in_the_background_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.0))
    average.update(model, iteration=0)
    shake(model)
    # This update happens only when the code waits for it.
    monkeypatch.setattr(ExponentialMovingAverage, "wait", lambda self: self.update(model, iteration=1))
    assert divergence({"a": average}, model)["a"].rel_l2 == 0


def test_no_copy_is_taken_of_an_average_that_is_swapped_in() -> None:
    model = network()
    bank = EMABank(model, {"a": EMAConfig()})
    bank.update(model, iteration=0)
    with bank["a"].swapped_into(model), pytest.raises(RuntimeError, match="swapped into"):
        live_copy(bank, model)


D = 4000
DECAYS = {"0.9": 0.9, "0.95": 0.95, "0.98": 0.98}


def expected_slope(squares: dict[str, float]) -> tuple[float, float]:
    """Least squares through the closed forms, and how far 5 standard errors of the squares can move it."""
    xs = [math.log(1 / (1 - DECAYS[name])) for name in squares]
    mean = sum(xs) / len(xs)
    weights = [(x - mean) / sum((other - mean) ** 2 for other in xs) for x in xs]
    ys = [math.log(square) for square in squares.values()]
    slope = sum(weight * y for weight, y in zip(weights, ys, strict=True))
    return slope, 5 * math.sqrt(2 / D) * sum(map(abs, weights))


@pytest.mark.parametrize(("kind", "about"), [("drift", 2), ("diffusion", 1), ("stationary", 0)])
def test_the_slope_over_decays_separates_drift_diffusion_and_noise(kind: str, about: int) -> None:
    torch.manual_seed(1)
    T = 400
    model = nn.Linear(D, 1, bias=False, dtype=torch.float64)
    start = model.weight.detach().clone()
    bank = EMABank(model, {name: EMAConfig(decay=b, dtype=None) for name, b in DECAYS.items()})
    for t in range(T + 1):
        bank.update(model, iteration=t)
        if t == T:
            break
        with torch.no_grad():
            if kind == "stationary":
                model.weight.copy_(start + torch.randn_like(start))
            else:
                model.weight.add_(0.01 if kind == "drift" else torch.randn_like(start))
    squares = {}
    for name, b in DECAYS.items():
        drift, noise = b**2 * (1 - b**T) ** 2 / (1 - b) ** 2, b**2 * (1 - b ** (2 * T)) / (1 - b**2)
        squares[name] = {"drift": drift, "diffusion": noise, "stationary": 2 * b**2 / (1 + b)}[kind]
    slope, tolerance = expected_slope(squares)
    found = drift_slope(divergence(bank, model))
    assert found == pytest.approx(slope, abs=1e-6 if kind == "drift" else tolerance)
    assert slope == pytest.approx(about, abs=0.12)


def test_the_horizon_is_in_iterations_and_known_once_the_decay_was_the_same_for_three() -> None:
    configs = {
        "constant": EMAConfig(decay=0.9),
        "every_4": EMAConfig(decay=0.9, update_every=4),
        "late": EMAConfig(decay=0.9, start_iter=50),
        "long": EMAConfig(decay=0.99),
        "power": EMAConfig(type="power", gamma=6.94),
        "warmup": EMAConfig(type="warmup", decay=0.9),
        "halflife": EMAConfig(type="halflife", halflife_kimg=0.01, rampup_ratio=None),
        "last": EMAConfig(decay=0.0),
        "frozen": EMAConfig(decay=1.0),
        "never": EMAConfig(start_iter=10_000),
    }
    model = network()
    bank = EMABank(model, configs)
    known: dict[str, int] = {}
    for iteration in range(200):
        bank.update(model, iteration=iteration)
        found = divergence(bank, model)
        for name, one in found.items():
            if one.horizon is not None:
                known.setdefault(name, iteration)
    # decay 0.9 for three horizons of 10, after the first update; the warm-up reaches it at t = 80.
    assert known == {"constant": 31, "every_4": 36, "late": 81, "warmup": 110, "halflife": 46, "last": 4}
    for name in ("constant", "every_4", "late", "warmup"):
        assert found[name].horizon == pytest.approx(10)
    # 2^(-1/10) per sample
    assert found["halflife"].horizon == pytest.approx(1 / (1 - 2**-0.1)) and found["last"].horizon == 1


def test_the_slope_needs_two_horizons_over_the_same_weights() -> None:
    def one(rel_l2: float, horizon: float | None, live_norm: float = 1.0) -> Divergence:
        return Divergence(rel_l2, 1.0, 0.0, live_norm=live_norm, horizon=horizon)

    a, b = one(0.1, 10), one(0.2, 20)
    assert drift_slope({"a": a, "b": b}) == pytest.approx(2)
    assert drift_slope({"a": a, "b": b, "other": one(0.9, 40, live_norm=2.0)}) == pytest.approx(2)
    assert drift_slope({"a": a, "b": b, "young": one(0.9, None)}) == pytest.approx(2)
    assert drift_slope({"a": a, "b": b, "broken": one(math.nan, 40), "equal": one(0.0, 5)}) == pytest.approx(
        2
    )
    assert drift_slope({}) is drift_slope({"a": a}) is drift_slope({"a": a, "twin": one(0.2, 10.0)}) is None
    assert drift_slope({"a": a, "other": one(0.2, 20, live_norm=2.0)}) is None


def test_averages_of_two_models_are_not_measured_together() -> None:
    one, other = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(KeyError, match=r"the model lacks '0\.weight'"):
        divergence({"one": averaged(one), "other": averaged(other)}, one)


def test_a_combination_without_live_weights_is_finite_though_they_are_not() -> None:
    model = nn.Linear(2, 2)
    bank = EMABank(model, {"a": EMAConfig(decay=0.5), "b": EMAConfig(decay=0.9)})
    bank.update(model, iteration=0)
    first = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    bank.update(model, iteration=1, finite=False)
    assert torch.equal(bank.combined(model, {"a": 0.5, "b": 0.5})["weight"], first)
    assert bank.combined(model, {"a": 0.5}, live=0.5)["weight"].isnan().all()
