"""The choice among averages that were made after the run: half A chooses, half B confirms."""

import pytest
import torch

from launch.synthesizing.cooldown import Cooldown
from launch.synthesizing.trials import Trial, headline, judge
from trainer.evaluation.axis import vertex


def trial(name: str, half_a: float, half_b: float, *, noise: float = 0.0, corrects: bool = False) -> Trial:
    """Values with these means over the even and the odd samples, and paired noise of zero mean within each half."""
    values = torch.tensor([half_a, half_b] * 50, dtype=torch.float64)
    wave = torch.tensor([1, 1, -1, -1] * 25, dtype=torch.float64)
    return Trial(name, values + noise * wave, corrects=corrects)


def test_half_a_chooses_and_half_b_measures() -> None:
    # On half B the one that half A chooses is not the better one; the choice stays, and the figure is that of half B.
    trials = [trial("one", 1.0, 1.3), trial("two", 1.1, 1.2, noise=0.01)]
    verdict = judge(trials, higher_is_better=False)
    assert verdict.best.name == "one"
    assert verdict.gaps["two"].mean == pytest.approx(-0.1)
    sentence = headline(verdict, trials, "loss", 7)
    assert sentence.startswith(
        "Chosen at step 7 by loss on half of the samples (A): one. On the other 50 samples (B)"
    )
    assert "it has 1.3" in sentence
    assert judge(trials, higher_is_better=True).best.name == "two"


@pytest.mark.parametrize(("half_b", "is_kept"), [(1.2, True), (1.3, False), (1.4, False)])
def test_a_correction_counts_only_if_half_b_confirms_it(half_b: float, is_kept: bool) -> None:
    plain, corrected = trial("plain", 1.0, 1.3), trial("corrected", 0.9, half_b, noise=0.05, corrects=True)
    verdict = judge([plain, corrected], higher_is_better=False)
    assert verdict.best is (corrected if is_kept else plain)
    assert verdict.refused == (None if is_kept else "corrected")
    refusal = "corrected was better on A, but not clearly on B, so it was not chosen."
    assert headline(verdict, [plain, corrected], "loss", 7).endswith(refusal) is not is_kept


def test_values_that_are_not_finite_are_not_chosen() -> None:
    broken = Trial("broken", torch.full((100,), float("nan"), dtype=torch.float64))
    assert judge([broken, trial("one", 1.0, 1.0)], higher_is_better=False).best.name == "one"


def test_the_vertex_of_a_parabola() -> None:
    assert vertex(*((x - 0.3) ** 2 + 5 for x in (-1, 0, 1))) == pytest.approx(0.3)
    assert vertex(3.0, 2.0, 1.0) == 1.0 and vertex(1.0, 2.0, 3.0) == -1.0
    assert vertex(1.0, 2.0, 1.5) == -1.0  # no minimum


def test_a_share_is_the_ratio_of_two_gains_with_the_error_of_a_ratio() -> None:
    """The reference is the spread of the ratio over drawn samples."""
    random, shares = torch.Generator().manual_seed(0), []
    for _ in range(400):
        noise = torch.randn(3, 400, generator=random, dtype=torch.float64)
        live = 3 + noise[0]
        cooled, average = live - 1 + 0.5 * noise[1], live - 0.8 + 0.5 * noise[2]
        share = Cooldown("cooled", 4, cooled, higher_is_better=False).share(live, average)
        assert share is not None
        shares.append((share.mean, share.se))
    means, errors = torch.tensor(shares).T
    assert float(means.mean()) == pytest.approx(0.8, abs=0.01)
    assert float(errors.mean()) == pytest.approx(float(means.std()), rel=0.1)
    assert Cooldown("cooled", 4, live, higher_is_better=False).share(live, average) is None
    assert Cooldown("cooled", 4, live + 1 + 0.5 * noise[1], False).share(live, average) is None
    assert Cooldown("cooled", 4, cooled, higher_is_better=True).share(live, average) is None
