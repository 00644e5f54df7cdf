"""The warnings about averages before a run. Numbers come from the formulas in the docstring of each test."""

import math

import pytest
from torch import nn

from ema import EMAConfig, ExponentialMovingAverage
from ema.advice import pitfalls
from ema.rules import profile


def warmup(decay: float, **more: object) -> EMAConfig:
    return EMAConfig(type="warmup", decay=decay, **more)  # type: ignore[arg-type]


def lines(num_iterations: int, **configs: EMAConfig) -> list[str]:
    return pitfalls(configs, num_iterations)


def plain_mean(t: int, config: EMAConfig) -> float:
    return 1 - 1 / t


def own_warmup(t: int, config: EMAConfig) -> float:
    return min(config.decay, t / (t + 5))


def test_averages_that_suit_the_run_give_no_warning() -> None:
    assert lines(10_000, a=EMAConfig(decay=0.99), b=EMAConfig(decay=0.999), c=EMAConfig(type="power")) == []
    assert pitfalls({}, 10) == []


def test_warm_ups_that_do_not_reach_their_decays_are_called_the_same() -> None:
    """(10 x 0.999 - 1) / (1 - 0.999) = 8990: until there 0.999 and 0.9999 are one average."""
    bank = {"low": warmup(0.9), "mid": warmup(0.999), "high": warmup(0.9999)}
    (line,) = pitfalls(bank, 8989)
    assert line.startswith("ema mid, high: equal during the whole run; they differ from iteration 8991 on")
    rows = [[profile(bank[name], end)[end] for name in ("mid", "high")] for end in (8990, 8991)]
    assert rows[0][0] == pytest.approx(rows[0][1], rel=1e-12)
    assert rows[1][0] != pytest.approx(rows[1][1], rel=1e-5)


def test_after_its_crossing_an_average_is_compared_with_nothing() -> None:
    (line,) = lines(8991, low=warmup(0.9), mid=warmup(0.999), high=warmup(0.9999))
    assert line.startswith("ema high: decay=0.9999 never takes effect (it would from iteration 89990 on,")
    assert line.endswith("every higher value gives the same average")
    assert lines(90_000, mid=warmup(0.999), high=warmup(0.9999)) == []


def test_a_late_start_and_rarer_updates_move_the_crossing() -> None:
    """Seen from the start at 1000 with one update in 10, the crossing at 8990 is in the update of 8991 ... 9000."""
    late = {"start_iter": 1000, "update_every": 10}
    (line,) = lines(9985, a=warmup(0.999, **late), b=warmup(0.9999, **late))
    assert "they differ from iteration 10000 on, and the run has 9985" in line
    (line,) = lines(10_001, a=warmup(0.999, **late), b=warmup(0.9999, **late))
    assert line.startswith("ema b: decay=0.9999 never takes effect")


def test_two_names_for_one_average_give_a_warning_for_any_rules() -> None:
    """A half-life of h samples at batch B is the decay 2^(-B/h)."""
    life = EMAConfig(type="halflife", halflife_kimg=0.064, batch_size=4, rampup_ratio=None)
    decay = EMAConfig(decay=2 ** (-4 / 64))
    (line,) = lines(500, life=life, decay=decay, other=EMAConfig(decay=0.9))
    assert (
        line
        == "ema life, decay: equal during the whole run; the settings in which they differ never take effect"
    )


@pytest.mark.parametrize(
    "field",
    [{"dtype": "float64"}, {"start_iter": 1}, {"exclude": ["head.*"]}, {"update_every": 2}],
)
def test_averages_of_other_values_are_not_called_the_same(field: dict[str, object]) -> None:
    assert lines(500, a=EMAConfig(decay=0.9), b=EMAConfig(decay=0.9, **field)) == []  # type: ignore[arg-type]


def test_device_and_mode_do_not_make_averages_different() -> None:
    (line,) = lines(500, a=EMAConfig(decay=0.9), b=EMAConfig(decay=0.9, mode="local_shard"))
    assert line.startswith("ema a, b: equal during the whole run")


def test_a_users_rule_that_ignores_the_decay_makes_a_fake_bank() -> None:
    bank = {str(decay): EMAConfig(rule="mine.mean", decay=decay) for decay in (0.9, 0.99)}
    (line,) = pitfalls(bank, 100, rules=dict.fromkeys(bank, plain_mean))
    assert (
        line
        == "ema 0.9, 0.99: equal during the whole run; the settings in which they differ never take effect"
    )
    (line,) = pitfalls(bank, 40, rules=dict.fromkeys(bank, own_warmup))
    assert line.startswith("ema 0.9, 0.99: equal during the whole run")
    assert pitfalls(bank, 1000, rules=dict.fromkeys(bank, own_warmup)) == []


def test_a_users_rule_is_asked_only_about_iterations_of_the_run() -> None:
    asked: list[int] = []

    def noted(t: int, config: EMAConfig) -> float:
        asked.append(t)
        return 0.5

    pitfalls({"a": EMAConfig(rule="mine.noted", start_iter=20)}, 120, rules={"a": noted})
    assert (min(asked), max(asked)) == (1, 100)


def test_a_rule_whose_callable_is_not_at_hand_is_judged_by_its_start_alone() -> None:
    """By the formula of `type` its decay 0.9999 would be warned of."""
    assert lines(100, a=EMAConfig(rule="mine.mean"), b=EMAConfig(rule="mine.mean", decay=0.9)) == []
    assert "start_iter=100" in lines(100, a=EMAConfig(rule="mine.mean", start_iter=100))[0]


def test_a_bad_rule_is_refused_as_in_the_run() -> None:
    with pytest.raises(ValueError, match=r"expected beta in \[0, 1\] at t=50, got 1.5"):
        rule = {"a": lambda t, config: 1.5 if t >= 50 else 0.5}
        pitfalls({"a": EMAConfig(rule="mine.wild")}, 50, rules=rule)


def test_a_half_life_that_its_ramp_holds_back_gives_a_warning() -> None:
    """The ramp ends where 0.05 of the samples seen are 500,000: after 1e7 samples, 312,500 iterations of 32."""
    config = EMAConfig(type="halflife", batch_size=32)
    (line,) = lines(5000, a=config)
    assert line.startswith(
        "ema a: halflife_kimg=500.0 never takes effect (it would from iteration 312500 on,"
    )
    assert lines(312_501, a=config) == []
    assert lines(5000, a=EMAConfig(type="fraction")) == []  # reads neither decay nor half-life


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("seen", [1000, 9000])
def test_a_horizon_longer_than_the_run_gives_a_warning_with_the_share_of_the_start(
    every: int, seen: int
) -> None:
    """0.9999 remembers 10,000 iterations; after 1,000 of them 0.9999^1000 = 90 % is the first weights."""
    (line,) = lines(seen, a=EMAConfig(update_every=every))
    assert f"and sees {seen}; {0.9999**seen:.0%} of it is still the first weights" in line
    assert line.startswith("ema a: remembers 10000 iterations")
    assert "remembers" not in lines(10_000, a=EMAConfig(update_every=every))[0]
    assert lines(50_000, a=EMAConfig(update_every=every)) == []


@pytest.mark.parametrize(
    ("config", "steps", "key"),
    [
        (EMAConfig(decay=0.999), 3000, "ema.decay=0.997 fits this run, and so does ema=warmup"),
        (EMAConfig(decay=0.99, update_every=7), 300, "ema.decay=0.97 fits this run, and so does ema=warmup"),
        (
            EMAConfig(type="debiased", decay=0.999),
            2000,
            "ema.decay=0.995 fits this run, and so does ema=warmup",
        ),
        # A decay d of the reference batch size is d^8 for eight times as many samples, and d^(1/8) for an eighth.
        (
            EMAConfig(decay=0.9999, batch_size=64, reference_batch_size=8),
            1250,
            "ema.decay=0.999 fits this run, and so does ema=warmup",
        ),
        (
            EMAConfig(decay=0.999, batch_size=8, reference_batch_size=64),
            1000,
            "ema.decay=0.92 fits this run, and so does ema=warmup",
        ),
        (
            EMAConfig(decay=0.999, batch_size=8, reference_batch_size=64),
            60,
            "ema=warmup fits this run",
        ),
        (EMAConfig(decay=0.9, start_iter=2), 12, "ema=warmup fits this run"),
        (
            EMAConfig(type="halflife", halflife_kimg=20, rampup_ratio=None, batch_size=32),
            2000,
            "ema.halflife_kimg=4.4 fits this run, and so does ema=fraction",
        ),
    ],
)
def test_averages_that_are_all_too_old_at_the_end_are_warned_of_with_a_key_that_fits(
    config: EMAConfig, steps: int, key: str
) -> None:
    """The age is compared with that of the profile, and the suggested value gives no warning."""
    age = sum(weight * (steps - step) for step, weight in enumerate(profile(config, steps)))
    (line,) = lines(steps, a=config)
    assert line.endswith(f"so it lags behind the live weights; {key}")
    if "remembers" not in line:
        assert f"its weights are {age:.0f} iterations old in the mean, {age / steps:.0%} of the run" in line
    field, value = key.split()[0].removeprefix("ema.").split("=")
    fits = warmup(0.5) if field == "ema" else EMAConfig(**{**vars(config), field: float(value)})
    assert not any("lags" in line for line in lines(steps, a=fits))


def test_a_long_average_of_a_bank_is_no_mistake_beside_one_that_fits() -> None:
    long, fitting = EMAConfig(decay=0.997), EMAConfig(decay=0.97)
    assert "lags" in lines(500, a=long)[0]
    assert lines(500, a=long, b=fitting) == []
    assert lines(1000, a=EMAConfig(type="debiased", decay=1.0)) == [], "the plain mean is asked for"


def test_the_horizon_counts_from_the_start() -> None:
    assert "sees 9999; 37%" in lines(10_001, a=EMAConfig(start_iter=2))[0]


def test_a_debiased_average_longer_than_the_run_gives_a_warning_without_a_share_of_the_start() -> None:
    (line,) = lines(1000, a=EMAConfig(type="debiased"))
    assert line.startswith("ema a: remembers 10000 iterations and sees 1000, so it lags")


def test_the_share_of_the_first_weights_is_the_product_of_all_decays() -> None:
    """For a rule whose decay varies. The test multiplies all decays, and the warning's share comes from samples."""

    def fading(t: int, config: EMAConfig) -> float:
        return 1 - 0.5 / (t + 10) ** 1.2

    config, end = EMAConfig(rule="mine.fading", dtype="float64"), 100_000
    first = math.prod(fading(t, config) for t in range(1, end + 1))
    (line,) = pitfalls({"a": config}, end, rules={"a": fading})
    assert f"sees {end}; {first:.0%} of it is still the first weights" in line


def test_the_horizon_of_a_scaled_batch_is_the_scaled_one() -> None:
    """0.99 for batches of 320 is 0.99^(1/10) for 32: about ten times 100 iterations."""
    scaled = EMAConfig(decay=0.99, batch_size=32, reference_batch_size=320)
    (line,) = lines(900, a=scaled)
    assert line.startswith("ema a: remembers 995 iterations and sees 900")
    assert lines(5000, a=scaled) == []


def test_an_average_that_never_updates_gives_a_warning() -> None:
    assert lines(100, a=EMAConfig(decay=0.9, update_every=101)) == [
        "ema a: update_every=101 and it sees 100 iterations: it stays the first weights"
    ]


def test_averages_that_never_start_give_one_warning() -> None:
    late = EMAConfig(decay=0.9, start_iter=100)
    assert lines(100, a=late, b=late, c=EMAConfig(decay=0.9)) == [
        "ema a, b: start_iter=100 is not before the end of 100 iterations,"
        " so it is equal to the live weights during the whole run"
    ]
    assert not any("live weights" in line for line in lines(101, a=late))


@pytest.mark.parametrize(
    ("dtype", "decay", "better"),
    [("bfloat16", 0.995, "float32"), ("float16", 0.9995, "float32"), ("float32", 0.99999, "float64")],
)
def test_a_shadow_that_cannot_move_gives_a_warning_with_its_distance(
    dtype: str, decay: float, better: str
) -> None:
    """The distance in the warning is right: a shadow of 1 does not move towards a weight a little nearer, but to one a
    little farther away.
    """
    (line,) = lines(10**7, a=EMAConfig(decay=decay, dtype=dtype))
    assert f"a {dtype} shadow does not move" in line and line.endswith(f"dtype={better} moves")
    near = float(line.split("less than ")[1].split("%")[0]) / 100
    for factor, moves in ((0.8, False), (1.25, True)):
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        average = ExponentialMovingAverage(model, EMAConfig(decay=decay, dtype=dtype))
        average.update(model, iteration=0)
        nn.init.constant_(model.weight, 1 + factor * near)
        average.update(model, iteration=1)
        assert bool(average.state_dict()["weight"] != 1) is moves, factor
    assert lines(10**7, a=EMAConfig(decay=decay, dtype=better)) == []


@pytest.mark.parametrize(
    ("dtype", "decay"),
    [("bfloat16", 0.95), ("float16", 0.99), ("float32", 0.9999), ("float64", 0.9999999), (None, 0.999)],
)
def test_a_shadow_that_moves_is_not_warned_of(dtype: str | None, decay: float) -> None:
    assert lines(10**8, a=EMAConfig(decay=decay, dtype=dtype)) == []


def test_the_floor_is_measured_on_the_decay_of_one_update() -> None:
    """0.999^50 = 0.951: an update every 50 iterations moves a bfloat16 shadow."""
    assert len(lines(10**5, a=EMAConfig(decay=0.999, dtype="bfloat16"))) == 1
    assert lines(10**5, a=EMAConfig(decay=0.999, dtype="bfloat16", update_every=50)) == []


def test_a_rule_is_judged_by_the_largest_decay_of_the_run() -> None:
    """bfloat16 gives a warning below a gain of 2^-8 / 0.1 = 0.039, which is 17.97 / t (gamma 16.97) at t = 460."""
    for config in (
        EMAConfig(type="power", dtype="bfloat16"),
        EMAConfig(type="power", sigma_rel=0.05, dtype="bfloat16"),
    ):
        assert lines(440, a=config) == []
        assert "does not move" in lines(480, a=config)[0]
    rule = {"a": lambda t, config: 0.99 if t == 300 else 0.5}
    assert "reaches 0.99," in pitfalls({"a": EMAConfig(rule="mine.r", dtype="bfloat16")}, 300, rules=rule)[0]


def test_a_long_run_is_judged_by_some_of_its_iterations() -> None:
    """A hundred million iterations are judged by some three hundred."""
    asked: list[int] = []

    def counted(t: int, config: EMAConfig) -> float:
        asked.append(t)
        return 0.5

    pitfalls({"a": EMAConfig(rule="mine.counted")}, 10**8, rules={"a": counted})
    assert len(asked) < 400 and {1, 10**8} <= set(asked)


def test_the_limits_of_a_decay_have_nothing_to_be_warned_of() -> None:
    """Decay 0 keeps the newest weights, a debiased decay of 1 is the plain mean: both take effect as chosen."""
    for config in (
        EMAConfig(type="debiased", decay=0.0),
        EMAConfig(decay=0.0, batch_size=8, reference_batch_size=4),
        EMAConfig(type="debiased", decay=1.0),
        EMAConfig(type="warmup", decay=1.0),
    ):
        assert not any("never takes effect" in line for line in pitfalls({"a": config}, 1000))


def test_a_shadow_in_the_dtype_of_bfloat16_weights_gives_a_warning_that_it_stalls() -> None:
    config = {"a": EMAConfig(decay=0.9999, dtype=None)}
    assert not any("bfloat16" in line for line in pitfalls(config, 100_000, live_dtype="float32"))
    (line,) = pitfalls(config, 100_000, live_dtype="bfloat16")
    assert "a bfloat16 shadow does not move" in line


def test_a_decay_that_rises_to_1_is_no_pitfall_unless_it_keeps_the_first_weights() -> None:
    """BYOL's decay: the sum of its gains is half of 0.004 x length, so exp(-20) of the first weights are left at 10^4.

    At 500 it is exp(-1) = 37%.
    """
    cosine = {"type": "cosine", "decay": 0.996}
    assert lines(10_000, a=EMAConfig(num_iterations=10_000, **cosine)) == []
    (line,) = lines(500, a=EMAConfig(num_iterations=500, **cosine))
    assert line == "ema a: 37% of it is still the first weights"
