"""Every averaging rule against its closed form.

Feed theta_t = e_t (one-hot) and the shadow is the row of weights the rule gives to the past. The expected
rows are closed forms: constant, power and half-life from the definition of the recursion, warm-up as a telescoping
product of rationals, debiased from Adam's bias correction, fraction from harmonic numbers, a decay of another batch
size from its power. None of them is computed with `ema.rules`.
"""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import nn

from ema import EMAConfig, ExponentialMovingAverage
from ema.rules import gain, gamma_from_sigma_rel, profile, sigma_rel_from_gamma

T = 84
DECAY = 0.95


def constant_row(t: int, k: int, decay: float = DECAY) -> list[float]:
    row = [0.0] * (t + 1)
    for s in range(k, t + 1, k):
        row[s] = (1 - decay**k) * decay ** (t - s)
    row[0] = decay**t
    return row


def larger_batches_row(t: int, k: int) -> list[float]:
    """Batches of 6 with a decay meant for 4: an iteration counts as one and a half."""
    return constant_row(t, k, DECAY**1.5)


def power_row(t: int, k: int, gamma: float = 6.94) -> list[float]:
    row = [0.0] * (t + 1)
    for s in range(k, t + 1, k):
        row[s] = (s / t) ** (gamma + 1) - ((s - k) / t) ** (gamma + 1)
    return row


def width_row(t: int, k: int) -> list[float]:
    """sigma_rel of gamma 2 is sqrt(3 / (4^2 5))."""
    return power_row(t, k, 2.0)


def fraction_row(t: int, k: int) -> list[float]:
    """Half-life of a quarter of the training: decays multiply to 2^-(4 (H_t - H_s))."""
    harmonic_numbers = [math.fsum(1 / r for r in range(1, s + 1)) for s in range(t + 1)]
    row = [0.0] * (t + 1)
    for s in range(k, t + 1, k):
        kept = 2 ** (-4 * (harmonic_numbers[s] - harmonic_numbers[s - k]))
        row[s] = (1 - kept) * 2 ** (-4 * (harmonic_numbers[t] - harmonic_numbers[s]))
    row[0] = 2 ** (-4 * harmonic_numbers[t])
    return row


def halflife_row(t: int, k: int) -> list[float]:
    """Half-life of 40 samples at batch size 4: ten iterations."""
    row = [0.0] * (t + 1)
    for s in range(k, t + 1, k):
        row[s] = 0.5 ** ((t - s) / 10) * (1 - 0.5 ** (k / 10))
    row[0] = 0.5 ** (t / 10)
    return row


def ramped_row(t: int, k: int) -> list[float]:
    """The same, at most half of what was seen: the exponents 1 / min(10, r / 2) of each iteration add up."""
    exponents = [1 / min(10, 0.5 * r) for r in range(1, t + 1)]
    row = [0.0] * (t + 1)
    for s in range(k, t + 1, k):
        row[s] = 0.5 ** sum(exponents[s:]) * (1 - 0.5 ** sum(exponents[s - k : s]))
    row[0] = 0.5 ** sum(exponents)
    return row


def warmup_row(t: int, k: int, decay: Fraction = Fraction(19, 20)) -> list[float]:
    """Decay 0.95 is reached at (10 x 0.95 - 1) / (1 - 0.95) = 170, after the end."""
    betas = [min(decay, Fraction(1 + r, 10 + r)) for r in range(1, t + 1)]
    row = [0.0] * (t + 1)
    for s in range(k, t + 1, k):
        row[s] = float(math.prod(betas[s:]) * (1 - math.prod(betas[s - k : s])))
    row[0] = float(math.prod(betas))
    return row


def crossing_row(t: int, k: int) -> list[float]:
    """Decay 0.8 is reached at (10 x 0.8 - 1) / (1 - 0.8) = 35, in the middle."""
    return warmup_row(t, k, Fraction(4, 5))


def scaled_crossing_row(t: int, k: int) -> list[float]:
    """0.8^2 for batches of twice the size: reached at 15."""
    return warmup_row(t, k, Fraction(16, 25))


def debiased_row(t: int, k: int, decay: float = DECAY) -> list[float]:
    row = [0.0] * (t + 1)
    for s in range(k, t + 1, k):
        row[s] = decay ** (t - s) * (1 - decay**k) / (1 - decay**t)
    return row


def scaled_debiased_row(t: int, k: int) -> list[float]:
    """Batches of half the size: half an iteration each."""
    return debiased_row(t, k, DECAY**0.5)


COSINE_LENGTH = 60
"""Iterations of the run after the start, fewer than T: afterwards the decay is 1."""


def cosine_row(t: int, k: int, decay: float = DECAY, batches: float = 1.0) -> list[float]:
    """BYOL, appendix: 1 - (1 - decay) (cos(pi r / length) + 1) / 2."""
    angles = [math.pi * min(r, COSINE_LENGTH) / COSINE_LENGTH for r in range(1, t + 1)]
    betas = [(1 - (1 - decay) * (math.cos(angle) + 1) / 2) ** batches for angle in angles]
    row = [0.0] * (t + 1)
    for s in range(k, t + 1, k):
        row[s] = math.prod(betas[s:]) * (1 - math.prod(betas[s - k : s]))
    row[0] = math.prod(betas[: t - t % k])
    return row


def larger_cosine_row(t: int, k: int) -> list[float]:
    """Batches of twice the size: each decay of the schedule is squared."""
    return cosine_row(t, k, batches=2.0)


def harmonic_row(t: int, k: int) -> list[float]:
    """A user's rule, beta = 1 - 1/(t+1): the plain mean of theta_0 ... theta_t (in blocks of k for k > 1)."""
    row = [0.0] * (t + 1)
    for s in range(k, t + 1, k):
        row[s] = k / (t + 1)
    row[0] = 1 / (t + 1)
    return row


def harmonic(t: int, config: EMAConfig) -> float:
    return 1 - 1 / (t + 1)


RULES: dict[str, tuple[dict[str, object], Callable[[int, int], list[float]]]] = {
    "constant": ({"type": "constant", "decay": DECAY}, constant_row),
    "power": ({"type": "power", "gamma": 6.94}, power_row),
    "halflife": (
        {"type": "halflife", "halflife_kimg": 0.04, "batch_size": 4, "rampup_ratio": None},
        halflife_row,
    ),
    "ramped": ({"type": "halflife", "halflife_kimg": 0.04, "batch_size": 4, "rampup_ratio": 0.5}, ramped_row),
    "warmup": ({"type": "warmup", "decay": DECAY}, warmup_row),
    "debiased": ({"type": "debiased", "decay": DECAY}, debiased_row),
    "fraction": ({"type": "fraction", "halflife_fraction": 0.25}, fraction_row),
    "sigma_rel": ({"type": "power", "sigma_rel": math.sqrt(3 / 80)}, width_row),
    "crossing": ({"type": "warmup", "decay": 0.8}, crossing_row),
    "larger batches": ({"decay": DECAY, "batch_size": 6, "reference_batch_size": 4}, larger_batches_row),
    "larger batches, warmup": (
        {"type": "warmup", "decay": 0.8, "batch_size": 64, "reference_batch_size": 32},
        scaled_crossing_row,
    ),
    "smaller batches, debiased": (
        {"type": "debiased", "decay": DECAY, "batch_size": 8, "reference_batch_size": 16},
        scaled_debiased_row,
    ),
    "cosine": ({"type": "cosine", "decay": DECAY}, cosine_row),
    "larger batches, cosine": (
        {"type": "cosine", "decay": DECAY, "batch_size": 64, "reference_batch_size": 32},
        larger_cosine_row,
    ),
    "user": ({"rule": "tests.harmonic"}, harmonic_row),
}


def config_of(name: str, **more: object) -> EMAConfig:
    length = {"num_iterations": COSINE_LENGTH + more.get("start_iter", 0)} if "cosine" in name else {}  # type: ignore[operator]
    return EMAConfig(**(RULES[name][0] | length | more))  # type: ignore[arg-type]


def rule_of(name: str) -> Callable[[int, EMAConfig], float] | None:
    return harmonic if name == "user" else None


class Vector(nn.Module):
    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=dtype))

    @torch.no_grad()
    def point(self, t: int) -> None:
        self.theta.zero_()[t] = 1


def impulse_response(
    config: EMAConfig, rule: Callable[[int, EMAConfig], float] | None, last: int, interrupt: int | None = None
) -> torch.Tensor:
    """The shadow after iterations 0 ... last, made anew from its saved state after iteration `interrupt`.

    Live weights are float32, or float64 where the shadow takes their dtype (None).
    """
    model = Vector(last + 1, torch.float64 if config.dtype is None else torch.float32)
    average = ExponentialMovingAverage(model, config, rule=rule)
    for t in range(last + 1):
        model.point(t)
        average.update(model, iteration=t)
        if t == interrupt:
            state = average.state_dict(snapshot=True)
            average = ExponentialMovingAverage(model, config, rule=rule)
            average.load_state_dict(state)
    return average.state_dict()["theta"]


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("name", RULES)
def test_the_impulse_response_is_the_closed_form(name: str, start: int, every: int) -> None:
    row = [0.0] * start + RULES[name][1](T, every)
    for dtype, tolerance in ((None, 1e-13), ("float64", 1e-13), ("float32", 1e-6)):
        config = config_of(name, start_iter=start, update_every=every, dtype=dtype)
        shadow = impulse_response(config, rule_of(name), start + T).double()
        torch.testing.assert_close(shadow, torch.tensor(row, dtype=torch.float64), rtol=0, atol=tolerance)


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize("name", RULES)
def test_the_profile_is_the_closed_form_and_sums_to_one(name: str, every: int) -> None:
    config = config_of(name, start_iter=3, update_every=every)
    weights = profile(config, 3 + T, rule_of(name))
    assert weights == pytest.approx([0.0] * 3 + RULES[name][1](T, every), abs=1e-13)
    assert math.fsum(weights) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize("name", RULES)
def test_resumed_is_uninterrupted_bit_for_bit_wherever_it_is_cut(name: str, every: int) -> None:
    config = config_of(name, start_iter=5, update_every=every, dtype="float64")
    row = torch.tensor([0.0] * 5 + RULES[name][1](35, every), dtype=torch.float64)
    whole = impulse_response(config, rule_of(name), 40)
    torch.testing.assert_close(whole, row, rtol=0, atol=1e-13)
    for interrupt in (0, 4, 5, 6, 12, 20, 39):
        assert torch.equal(impulse_response(config, rule_of(name), 40, interrupt), whole), interrupt


def test_half_of_an_old_weight_is_left_after_the_half_life_for_every_batch_size() -> None:
    for batch_size in (1, 4, 32):
        config = EMAConfig(type="halflife", halflife_kimg=0.32, batch_size=batch_size, rampup_ratio=None)
        assert profile(config, 320 // batch_size)[0] == pytest.approx(0.5, rel=1e-12)


def test_warm_up_is_the_power_rule_of_gamma_8_until_it_reaches_the_decay() -> None:
    """EMA.md's identity: prod (1+r)/(10+r) from s+1 to t, up to t = (10b - 1)/(1 - b)."""
    b = 0.99
    turn = (10 * b - 1) / (1 - b)
    assert gain(EMAConfig(type="warmup", decay=b), math.floor(turn)) > 1 - b + 1e-9
    assert gain(EMAConfig(type="warmup", decay=b), math.ceil(turn) + 1) == 1 - b


def test_a_fraction_tends_to_the_power_rule_of_ln_2_over_f() -> None:
    """H_t - H_s is ln(t/s) but for 1/(2s), so that 2^(-(H_t - H_s)/f) is (s/t)^(ln 2 / f)."""
    weights = profile(EMAConfig(type="fraction", halflife_fraction=0.05), 20_000)
    like_power = profile(EMAConfig(type="power", gamma=math.log(2) / 0.05 - 1), 20_000)
    assert math.fsum(abs(w - p) for w, p in zip(weights, like_power, strict=True)) < 1e-3


def test_the_ramp_of_the_half_life_is_a_fraction_of_the_training() -> None:
    ramp = EMAConfig(type="halflife", halflife_kimg=1e9, rampup_ratio=0.05, batch_size=32)
    assert profile(ramp, 200) == pytest.approx(profile(EMAConfig(type="fraction"), 200), abs=1e-15)


@pytest.mark.parametrize("kind", ["constant", "warmup", "debiased"])
def test_a_decay_of_the_same_batch_size_is_taken_to_the_last_bit(kind: str) -> None:
    plain = EMAConfig(type=kind, decay=0.9997, batch_size=96)
    same = EMAConfig(type=kind, decay=0.9997, batch_size=96, reference_batch_size=96)
    assert [gain(same, t) for t in range(1, 50)] == [gain(plain, t) for t in range(1, 50)]
    for decay in [0.005 * n for n in range(1, 200)]:  # 1 - b and -expm1(log(b)) differ for some
        assert gain(EMAConfig(type=kind, decay=decay), 10**9) == 1 - decay


def test_the_same_samples_weigh_the_same_at_every_batch_size() -> None:
    """Decay 0.99 meant for batches of 32: 640 samples ago, a weight counts 0.99^20 of now in all of them."""
    for batch_size in (1, 8, 64, 640):
        config = EMAConfig(decay=0.99, batch_size=batch_size, reference_batch_size=32)
        assert profile(config, 640 // batch_size)[0] == pytest.approx(0.99**20, rel=1e-12)


def test_the_limits_of_the_decay_hold_for_other_batch_sizes() -> None:
    for kind in ("constant", "warmup", "debiased"):
        other = EMAConfig(type=kind, decay=0.0, batch_size=3, reference_batch_size=2)
        assert profile(other, 5)[5] == 1
    assert profile(EMAConfig(decay=1.0, batch_size=3, reference_batch_size=2), 3) == [1, 0, 0, 0]


def test_one_minus_beta_keeps_its_digits_near_one() -> None:
    """Series: 1 - (1 - 1/t)^(g+1) = (g+1)/t - (g+1)g/(2 t^2) + ..., beyond what 1 - float(beta) can hold."""
    t, g = 10**12, 6.94
    assert gain(EMAConfig(type="power", gamma=g), t) == pytest.approx(
        (g + 1) / t - (g + 1) * g / (2 * t * t), rel=1e-15
    )
    life = EMAConfig(type="halflife", halflife_kimg=1e12, rampup_ratio=None)
    assert gain(life, 1) == pytest.approx(math.log(2) / 1e15, rel=1e-14)


def test_update_every_compounds_the_decay() -> None:
    assert gain(EMAConfig(decay=0.9999, update_every=100), 100) == pytest.approx(1 - 0.9999**100, rel=1e-11)
    power = EMAConfig(type="power", gamma=6.94, update_every=10)
    assert gain(power, 10) == 1
    assert gain(power, 1000) == pytest.approx(1 - 0.99**7.94, rel=1e-12)


@pytest.mark.parametrize(("gamma", "sigma"), [(16.97, 0.05), (6.94, 0.10)])
def test_sigma_rel_and_gamma_are_those_of_the_paper(gamma: float, sigma: float) -> None:
    """EDM2 names the pairs 16.97 / 0.05 and 6.94 / 0.10."""
    assert sigma_rel_from_gamma(gamma) == pytest.approx(sigma, rel=1e-3)
    assert gamma_from_sigma_rel(sigma) == pytest.approx(gamma, rel=1e-3)


@pytest.mark.parametrize("gamma", [0.01, 1.0, 6.94, 16.97, 1e3, 1e6])
def test_sigma_rel_inverts(gamma: float) -> None:
    assert gamma_from_sigma_rel(sigma_rel_from_gamma(gamma)) == pytest.approx(gamma, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [1e-15, 1e-17, 1e-200, 5e-324])
def test_a_profile_without_width_is_the_live_weights(sigma_rel: float) -> None:
    assert profile(EMAConfig(type="power", sigma_rel=sigma_rel), 3) == [0, 0, 0, 1]


def test_sigma_rel_is_the_width_of_the_profile() -> None:
    weights = profile(EMAConfig(type="power", sigma_rel=0.1), 4000)
    mean = math.fsum(s * w for s, w in enumerate(weights))
    variance = math.fsum((s - mean) ** 2 * w for s, w in enumerate(weights))
    assert math.sqrt(variance) / 4000 == pytest.approx(0.1, rel=1e-3)


def test_a_profile_before_the_start_is_the_live_weights() -> None:
    assert profile(EMAConfig(start_iter=9), 4) == [0, 0, 0, 0, 1]


def test_the_limits_of_the_decay_work_in_every_rule() -> None:
    for kind in ("constant", "warmup", "debiased"):
        assert profile(EMAConfig(type=kind, decay=0.0), 5)[5] == 1
    assert profile(EMAConfig(decay=1.0), 5) == [1, 0, 0, 0, 0, 0]
    assert profile(EMAConfig(type="debiased", decay=1.0), 5) == pytest.approx([0] + [0.2] * 5)


def test_a_users_rule_must_stay_in_the_unit_interval() -> None:
    with pytest.raises(ValueError, match=r"expected beta in \[0, 1\] at t=3, got 1.5"):
        gain(EMAConfig(rule="mine.wild"), 3, lambda t, config: 1.5)


@pytest.mark.parametrize("drift", [0.0, 0.3])
@pytest.mark.parametrize(("b", "steps"), [(0.9, 60), (0.99, 60), (0.5, 3)])
def test_the_lag_behind_a_random_walk_is_the_closed_form(drift: float, b: float, steps: int) -> None:
    """E e^2 = mu^2 b^2 (1-b^t)^2/(1-b)^2 + s^2 b^2 (1-b^2t)/(1-b^2), within five standard errors 5 sqrt(2/D).

    With a drift the error is N(m, v) with m^2 + v as above, and its square scatters less than chi-squared's.
    """
    size = 20_000
    generator = torch.Generator().manual_seed(1)
    model = Vector(size, torch.float32)
    average = ExponentialMovingAverage(model, EMAConfig(decay=b))
    average.update(model, iteration=0)
    for t in range(1, steps + 1):
        with torch.no_grad():
            model.theta.add_(drift + torch.randn(size, generator=generator))
        average.update(model, iteration=t)
    error = (model.theta.detach() - average.state_dict()["theta"]).double().square().mean().item()
    expected = drift**2 * b**2 * (1 - b**steps) ** 2 / (1 - b) ** 2 + b**2 * (1 - b ** (2 * steps)) / (
        1 - b**2
    )
    assert error == pytest.approx(expected, rel=5 * math.sqrt(2 / size))


@pytest.mark.parametrize(
    ("b", "r", "steps"), [(0.9, 0.5, 150), (0.9, 0.0, 150), (0.9, -0.5, 150), (0.97, 0.9, 350)]
)
def test_the_average_of_a_stationary_process_has_the_closed_form_variance(
    b: float, r: float, steps: int
) -> None:
    """AR(1), coefficient r, variance v: Var M = v(1-b)(1+br)/((1+b)(1-br)), E e^2 = 2 v b^2 (1-r)/((1+b)(1-br))."""
    size, v = 20_000, 2.0
    generator = torch.Generator().manual_seed(2)
    model = Vector(size, torch.float32)
    average = ExponentialMovingAverage(model, EMAConfig(decay=b))
    theta = math.sqrt(v) * torch.randn(size, generator=generator)
    for t in range(steps):
        with torch.no_grad():
            model.theta.copy_(theta)
        average.update(model, iteration=t)
        theta = r * theta + math.sqrt(v * (1 - r * r)) * torch.randn(size, generator=generator)
    mean = average.state_dict()["theta"].double()
    error = (model.theta.detach().double() - mean).square().mean().item()
    tolerance = 5 * math.sqrt(2 / size)
    assert mean.square().mean().item() == pytest.approx(
        v * (1 - b) * (1 + b * r) / ((1 + b) * (1 - b * r)), rel=tolerance
    )
    assert error == pytest.approx(2 * v * b * b * (1 - r) / ((1 + b) * (1 - b * r)), rel=tolerance)


def test_the_cosine_begins_at_the_decay_and_ends_at_1() -> None:
    config = EMAConfig(type="cosine", decay=0.996, num_iterations=1000, start_iter=100)
    betas = [1 - gain(config, t) for t in (1, 450, 900, 5000)]
    assert betas == pytest.approx([0.996, 0.998, 1, 1], abs=1e-7) and betas[2:] == [1, 1]
    assert (
        gain(EMAConfig(type="cosine", decay=0.0, num_iterations=10, batch_size=2, reference_batch_size=1), 0)
        == 1
    )
