"""Averages that nobody tracked, against closed forms.

Profiles are those of the rules' definitions; the solutions are those of a dense least-squares problem with the whole
matrix; coefficients of merged checkpoints are the decrements of Tian et al. (WSM, 2025, arXiv:2507.17634), written out.
"""

import json
import math
import resource
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from ema import EMAConfig, ExponentialMovingAverage
from ema.posthoc import (
    DECAYS,
    Snapshot,
    Synthesis,
    Weights,
    decrements,
    given_weights,
    rows,
    saved_snapshot,
    solve,
    window_profile,
)
from ema.rounding import distances
from ema.rules import profile
from ema.state import COUNTERS, RULE, read_rule


def power(step: int, sigma_rel: float = 0.1) -> Snapshot:
    return Snapshot(step, EMAConfig(type="power", sigma_rel=sigma_rel))


def constant(step: int, decay: float) -> Snapshot:
    return Snapshot(step, EMAConfig(decay=decay))


def dense(one: Snapshot | Weights, last: int) -> np.ndarray:
    """The whole row of weights, block by block."""
    blocks = [block for _, block in rows([one], last)]
    return torch.cat(blocks[::-1])[:, 0].numpy()


def two_series(count: int, last: int) -> list[Snapshot]:
    """Two power averages, each stored at evenly spaced steps, with the first and the last weights."""
    steps = [last * number // count for number in range(1, count + 1)]
    return [*(power(step, width) for step in steps for width in (0.05, 0.1)), Snapshot(0), Snapshot(last)]


def brute_force(snapshots: list[Snapshot], target: Snapshot | Weights, norm: str) -> tuple[np.ndarray, float]:
    """Coefficients and predicted error by numpy's dense least squares, the constraint as a heavy row."""
    last = target.step
    matrix = np.stack([dense(one, last) for one in snapshots], 1)
    wanted, live = dense(target, last), np.eye(last + 1)[-1]

    def tails(rows_of: np.ndarray) -> np.ndarray:
        return rows_of[::-1].cumsum(0)[::-1]

    changed = tails if norm == "tail" else lambda rows_of: rows_of
    heavy = 1e6 * np.ones((1, len(snapshots)))
    left = np.concatenate([changed(matrix), heavy])
    solved = np.linalg.lstsq(left, np.append(changed(wanted), 1e6), rcond=None)[0]
    away = np.linalg.norm(tails(matrix @ solved - wanted)[1:])
    return solved, float(away / np.linalg.norm(tails(wanted - live)[1:]))


@pytest.mark.parametrize("step", [1, 7, 4096, 9001])
def test_a_power_row_is_its_closed_form_across_blocks(step: int) -> None:
    gamma = 6.94
    ratio = np.arange(step + 1) / step
    expected = np.diff(ratio ** (gamma + 1), prepend=0)
    found = dense(Snapshot(step, EMAConfig(type="power", gamma=gamma)), step)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "config",
    [
        EMAConfig(decay=0.99, start_iter=5000),
        EMAConfig(type="halflife", halflife_kimg=0.3, batch_size=2),
        EMAConfig(type="fraction"),
        EMAConfig(type="warmup", decay=0.999),
        EMAConfig(type="debiased", decay=0.99, update_every=3, start_iter=7),
        EMAConfig(type="cosine", decay=0.9, num_iterations=9000),
    ],
    ids=lambda config: config.type,
)
def test_rows_of_every_rule_are_the_profiles_of_the_recursion(config: EMAConfig) -> None:
    np.testing.assert_allclose(
        dense(Snapshot(9001, config), 9001), profile(config, 9001), rtol=1e-11, atol=1e-300
    )


def test_the_recorded_origin_is_absorbed_first() -> None:
    """A loop whose first update is at iteration 1 is one step younger ever after."""
    late = dense(Snapshot(12, EMAConfig(type="power"), origin=1), 12)
    np.testing.assert_allclose(late[1:], profile(EMAConfig(type="power"), 11), rtol=1e-12, atol=1e-300)
    assert late[0] == 0
    assert dense(Snapshot(3, EMAConfig(decay=0.9, start_iter=9)), 3).tolist() == [0, 0, 0, 1]


def one_half(t: int, config: EMAConfig) -> float:
    return 0.5


def saved_state(steps: range, skipped: int = -1, **fields: Any) -> dict[str, torch.Tensor]:
    """The state of an average after the updates of these iterations."""
    model, config = torch.nn.Linear(1, 1), EMAConfig(**fields)
    average = ExponentialMovingAverage(model, config, rule=one_half if config.rule else None)
    for step in steps:
        average.update(model, iteration=step, finite=step != skipped)
    return average.state_dict()


def test_a_saved_average_is_a_snapshot_with_the_origin_of_its_counters() -> None:
    fields = {"type": "power", "sigma_rel": 0.1, "update_every": 2}
    assert saved_snapshot(saved_state(range(1, 8), **fields)) == Snapshot(7, EMAConfig(**fields), origin=1)
    assert saved_snapshot(saved_state(range(8), start_iter=9)) == Snapshot(7)  # it is the live weights
    own = saved_state(range(3), rule="a.half")
    assert saved_snapshot(own, one_half) == Snapshot(2, EMAConfig(rule="a.half"), 0, one_half)


def test_a_saved_average_whose_row_is_unknown_is_refused() -> None:
    state = saved_state(range(4))
    foreign = state | {COUNTERS: torch.tensor([1, 4, 0, -1, 3])}
    with pytest.raises(ValueError, match="expected the first and the last iteration"):
        saved_snapshot(foreign)
    with pytest.raises(ValueError, match="expected the callable of the rule"):
        saved_snapshot(saved_state(range(3), rule="a.half"))
    rule = read_rule(state[RULE])
    for changed in (rule | {"decay": 2.0}, rule | {"unknown": 1}):
        broken = torch.tensor(list(json.dumps(changed).encode()), dtype=torch.uint8)
        with pytest.raises(ValueError, match="expected the settings of a rule"):
            saved_snapshot(state | {RULE: broken})
    with pytest.raises(KeyError, match=COUNTERS):
        saved_snapshot({"weight": torch.zeros(1)})


def test_an_average_that_had_another_rule_is_no_snapshot() -> None:
    """Its row is not that of its present rule, also after further sessions, and if the first rule comes back."""
    power = {"type": "power", "sigma_rel": 0.1}

    def continued(state: dict[str, torch.Tensor], at: int, **fields: Any) -> dict[str, torch.Tensor]:
        model, rule = torch.nn.Linear(1, 1), one_half if "rule" in fields else None
        average = ExponentialMovingAverage(model, EMAConfig(**fields), rule=rule)
        average.load_state_dict(state)
        average.update(model, iteration=at)
        return average.state_dict(snapshot=True)

    first = saved_state(range(4), decay=0.9)
    with pytest.warns(UserWarning, match="another rule"):
        changed = continued(first, 4, decay=0.8)
    with pytest.warns(UserWarning, match="another rule"):
        back = continued(continued(changed, 5, decay=0.8), 6, decay=0.9)
    foreign = continued({"weight": torch.zeros(1, 1), "bias": torch.zeros(1)}, 4)
    for state in (changed, back, foreign):
        with pytest.raises(ValueError, match="expected one rule since the origin of the average"):
            saved_snapshot(state)
    # Fields that the rule does not read may change, and before the start all may.
    assert saved_snapshot(continued(first, 4, decay=0.9, gamma=2.0, batch_size=7)).step == 4
    with pytest.warns(UserWarning, match="another rule"):
        begun = continued(saved_state(range(4), start_iter=9), 4, **power)
    assert saved_snapshot(begun) == Snapshot(4, EMAConfig(**power), origin=4)
    # A user's own rule may read the length of the run; the saved fields do not show whether it does.
    own = saved_state(range(4), rule="a.half", num_iterations=4)
    with pytest.warns(UserWarning, match="num_iterations 4 -> 5"):
        longer = continued(own, 4, rule="a.half", num_iterations=5)
    assert saved_snapshot(longer, one_half).step == 4
    with pytest.warns(UserWarning, match="update_every 1 -> 2"):
        rarer = continued(own, 4, rule="a.half", num_iterations=4, update_every=2)
    with pytest.raises(ValueError, match="expected one rule since the origin of the average"):
        saved_snapshot(rarer, one_half)


def test_the_longest_rule_that_can_be_saved_can_also_be_changed() -> None:
    def average(length: int) -> ExponentialMovingAverage:
        config = EMAConfig(rule="a." + "b" * length, halflife_kimg=1.0)
        return ExponentialMovingAverage(torch.nn.Linear(1, 1), config, rule=one_half)

    longest = 1022
    while True:
        try:
            one = average(longest)
            break
        except ValueError:
            longest -= 1
    with pytest.warns(UserWarning, match="another rule"):
        one.load_state_dict(saved_state(range(4), decay=0.9))
    fields = read_rule(one.state_dict()[RULE])
    assert (fields["rule"], fields["since_origin"]) == ("a." + "b" * longest, False)


def test_skipped_steps_make_a_row_inexact_which_the_solution_says() -> None:
    saved = saved_snapshot(saved_state(range(8), skipped=3, decay=0.9))
    assert saved.skipped == 1
    warned = solve([Snapshot(0), saved, saved, Snapshot(7)], constant(7, 0.8)).warnings
    assert any("skipped non-finite steps (1 at most)" in line for line in warned)


def test_a_users_own_rule_has_its_own_row() -> None:
    mean = Snapshot(9, EMAConfig(rule="a.mean"), rule=lambda t, config: 1 - 1 / t)
    both = torch.cat([block for _, block in rows([mean, Snapshot(9, EMAConfig(decay=0.5))], 9)])
    np.testing.assert_allclose(both[1:, 0], [1 / 9] * 9, rtol=1e-12)
    assert both[:, 1].tolist() == profile(EMAConfig(decay=0.5), 9)


@pytest.mark.parametrize("norm", ["tail", "l2"])
@pytest.mark.parametrize("target", [power(300, 0.075), constant(300, 0.97)], ids=["power", "constant"])
def test_blocks_give_the_solution_of_the_whole_matrix(
    norm: str, target: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = two_series(5, 300)
    expected, error = brute_force(snapshots, target, norm)
    monkeypatch.setattr("ema.rows.BLOCK", 7)
    found = solve(snapshots, target, norm)
    np.testing.assert_allclose(found.coefficients, expected, rtol=1e-6, atol=1e-9)
    assert found.error == pytest.approx(error, rel=1e-6)
    assert math.fsum(found.coefficients) == pytest.approx(1, abs=1e-12)
    assert found.amplification == pytest.approx(np.abs(expected).sum(), rel=1e-6)


@pytest.mark.parametrize("norm", ["tail", "l2"])
def test_two_series_rebuild_a_power_profile_that_they_span(norm: str) -> None:
    """The closed form of the middle snapshot, with 1e-12, from the combination of rows."""
    step, gamma = 2000, EMAConfig(type="power", sigma_rel=0.05)
    snapshots = two_series(4, 2000)
    found = solve(snapshots, Snapshot(step, gamma), norm)
    together = sum(x * dense(one, step) for x, one in zip(found.coefficients, snapshots, strict=True))
    np.testing.assert_allclose(together, profile(gamma, step), atol=1e-12)
    assert found.error < 1e-11 and not found.warnings


def test_the_error_of_two_series_falls_with_the_third_power_of_their_number() -> None:
    errors = [solve(two_series(count, 4000), power(4000, 0.075)).error for count in (8, 16, 32)]
    assert errors[1] < 2.1e-3  # 16 + 16 snapshots and both ends
    assert all(5 < few / many < 10 for few, many in pairwise(errors))


def test_the_tail_norm_predicts_less_error_than_the_l2_norm() -> None:
    tail, plain = (solve(two_series(8, 4000), power(4000, 0.075), norm).error for norm in ("tail", "l2"))
    assert 1.3 < plain / tail < 4.5


def test_the_first_weights_take_most_of_the_error_of_a_long_average() -> None:
    snapshots = two_series(16, 10_000)
    without = [one for one in snapshots if one != Snapshot(0)]
    target = constant(10_000, 0.9999)
    assert solve(without, target).error > 20 * solve(snapshots, target).error


@pytest.mark.parametrize("horizon", [50, 150, 400])
def test_a_bank_of_doubled_horizons_rebuilds_every_decay_between(horizon: int) -> None:
    bank = [constant(4000, 1 - 2.0**-number) for number in range(3, 13)]
    found = solve([*bank, Snapshot(0), Snapshot(4000)], constant(4000, 1 - 1 / horizon))
    assert found.error < 4e-3 and found.amplification < 4 and not found.warnings


def test_checkpoints_get_the_decrements_of_the_decay() -> None:
    steps = [600, 700, 800, 900, 1000]
    n = len(steps)
    published = {
        "minus_sqrt": [(math.sqrt(j + 1) - math.sqrt(j)) / math.sqrt(n) for j in range(n)],
        "linear": [1 / n] * n,
        "uniform": [1 / n] * n,
        "cosine": [(math.cos(math.pi * j / n) - math.cos(math.pi * (j + 1) / n)) / 2 for j in range(n)],
    }
    for name, expected in published.items():
        assert decrements(DECAYS[name], steps) == pytest.approx(expected, abs=1e-12)
        snapshots = [Snapshot(step) for step in steps]
        target = window_profile(DECAYS[name], 1000, window=n, every=100)
        assert solve(snapshots, target).coefficients == pytest.approx(expected, abs=1e-12)
        assert solve(snapshots, target, "l2").coefficients == pytest.approx(expected, abs=1e-12)


def test_a_decay_that_does_not_end_at_zero_leaves_the_rest_to_the_newest() -> None:
    assert decrements(lambda done: 5.0, [1, 2, 3]) == [0, 0, 1]
    half = decrements(lambda done: 1 - done / 2, [10, 20, 30, 40])
    assert half == pytest.approx([1 / 8, 1 / 8, 1 / 8, 5 / 8])
    assert decrements(DECAYS["minus_sqrt"], [7]) == [1]


def test_uneven_checkpoints_stand_for_the_steps_between_them() -> None:
    uneven = decrements(DECAYS["linear"], [0, 10, 40])
    assert uneven == pytest.approx([10 / 60, 30 / 60, 20 / 60])


def test_checkpoints_between_the_steps_of_a_decay_take_its_mean() -> None:
    """The tail sum of the solution between two checkpoints is the mean of the target's: its least squares."""
    target = window_profile(DECAYS["minus_sqrt"], 400, window=401)
    found = solve([Snapshot(step) for step in (0, 100, 400)], target).coefficients
    tails = dense(target, 400)[::-1].cumsum()[::-1]
    assert found[1] + found[2] == pytest.approx(tails[1:101].mean(), abs=1e-12)
    assert found[2] == pytest.approx(tails[101:].mean(), abs=1e-12)


def test_given_weights_are_a_target() -> None:
    target = given_weights([0.25, 0.5, 0.25], 9)
    assert dense(target, 9).tolist() == [0] * 7 + [0.25, 0.5, 0.25]
    found = solve([Snapshot(7), Snapshot(8), Snapshot(9)], target)
    assert found.coefficients == pytest.approx([0.25, 0.5, 0.25], abs=1e-12)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], "expected 1 to 4 weights"),
        ([0.2] * 5, "expected 1 to 4 weights"),
        ([0.5, math.nan], "number 2 is not"),
        ([0.5, 0.4], "sum 1, got sum 0.9"),
        ([[1.0]], "in one row"),
    ],
)
def test_weights_that_are_no_profile_are_refused(values: list[float], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        given_weights(values, 3)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="one of step 9 is later than the target of step 8"):
        solve([Snapshot(9)], power(8))
    with pytest.raises(ValueError, match="at least one"):
        solve([], power(8))
    with pytest.raises(ValueError, match="expected one of tail, l2"):
        solve([Snapshot(8)], power(8), "max")
    for rounding in ([], [0.1], [0.1] * 3, [0.1, math.nan], [math.inf, 0.1], [0.1, -0.1]):
        with pytest.raises(ValueError, match=r"rounding: .* at least 0 for each snapshot \(2\), got \["):
            solve([Snapshot(7), Snapshot(8)], power(8), rounding=rounding)
    with pytest.raises(ValueError, match="window: expected 1 to 9 weights, got 10"):
        window_profile(DECAYS["linear"], 8, 10)
    with pytest.raises(ValueError, match="rising steps"):
        decrements(DECAYS["linear"], [3, 3])
    with pytest.raises(ValueError, match="begin above 0"):
        decrements(lambda done: done, [1, 2])


def warned(found: Synthesis, word: str) -> bool:
    return any(word in warning for warning in found.warnings)


def test_doubtful_combinations_are_warned_of() -> None:
    early = solve([constant(90, 0.9), Snapshot(0)], constant(100, 0.9))
    assert warned(early, "extrapolation: the target has 65.1% of its weight after step 90")
    assert warned(early, "predicted error")
    twice = solve([power(100), power(100), Snapshot(0)], power(100))
    assert twice.condition > 1e8 and twice.error < 1e-10
    assert twice.warnings == [], "equal snapshots share the coefficient, which amplifies nothing"
    assert twice.coefficients == pytest.approx([0.5, 0.5, 0], abs=1e-9)
    near = solve([constant(100, 0.9), constant(100, 0.9001), Snapshot(0)], constant(100, 0.95))
    assert warned(near, "rounding errors of the snapshots can grow")
    alone = solve([Snapshot(5)], Snapshot(5))
    assert (alone.coefficients, alone.error, alone.warnings) == ([1.0], 0.0, [])
    among = solve([Snapshot(48), constant(48, 0.9), constant(48, 0.99)], constant(48, 0.0))
    assert (among.error, among.warnings) == (0.0, [])
    missing = solve([constant(48, 0.9), constant(48, 0.99)], constant(48, 0.0))
    assert missing.error == math.inf and warned(missing, "the snapshots cannot make these")


@pytest.mark.parametrize("norm", ["tail", "l2"])
def test_equal_snapshots_are_weighted_by_the_inverse_squares_of_their_rounding(norm: str) -> None:
    """The closed form of the mean of two independent errors; a target that the snapshots are."""
    r, s = 0.03, 0.04
    found = solve([power(100), power(100)], power(100), norm, rounding=[r, s])
    assert found.coefficients == pytest.approx([s**2 / (r**2 + s**2), r**2 / (r**2 + s**2)])
    (far,) = distances([power(100)], [Snapshot(100)])
    assert found.error == pytest.approx(r * s / math.hypot(r, s) / far)


@pytest.mark.parametrize("rounding", [1e-5, 1e-2, 3.0])
def test_the_live_weights_are_made_of_themselves_whatever_their_rounding(rounding: float) -> None:
    """Their neighbours get a share where that lowers the rounding, so they are not exact."""
    found = solve([power(20), Snapshot(19), Snapshot(20)], constant(20, 0.0), rounding=[rounding] * 3)
    assert found.error == 0 and found.warnings == []
    far = solve([power(20), Snapshot(19)], constant(20, 0.0), rounding=[rounding] * 2)
    assert far.error == math.inf and warned(far, "the snapshots cannot make these")


def test_coefficients_grow_no_further_than_the_known_rounding_allows() -> None:
    snapshots = [
        *(constant(80, decay) for decay in (0.9, 0.97, 0.99, 0.997, 0.999)),
        Snapshot(0),
        Snapshot(80),
    ]
    unknown, known = (solve(snapshots, constant(80, 0.5), rounding=one) for one in (None, [1e-4] * 7))
    assert warned(unknown, "rounding errors of the snapshots can grow") and not warned(
        known, "rounding errors"
    )
    assert known.amplification < unknown.amplification / 10
    # What it predicts has the rounding in it, and is the least: the coefficients without it would be worse.
    (far,) = distances([constant(80, 0.5)], [Snapshot(80)])
    rounded = 1e-4 * math.sqrt(math.fsum(x * x for x in unknown.coefficients)) / far
    assert unknown.error < known.error < math.hypot(unknown.error, rounded)


def test_a_million_steps_and_a_hundred_snapshots_need_little_memory() -> None:
    """All rows would take 800 MB."""
    last = 1_000_000
    snapshots = [Snapshot(last * number // 100, EMAConfig(decay=0.99999)) for number in range(1, 101)]
    solve(snapshots[:9], constant(snapshots[8].step, 0.9999))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = solve(snapshots, constant(last, 0.99995))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert found.error < 0.2
    assert grown < 100_000, grown  # KiB
