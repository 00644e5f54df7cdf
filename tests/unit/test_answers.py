"""A comparison of settings answers each question by itself: setting, average or live, which average, more seeds."""

import csv
import math

import numpy as np
import pytest

from tests.simulated import STEP, run_of
from trainer.report.answers import Answer
from trainer.report.comparison import combine
from trainer.report.first_screen import first_screen
from trainer.report.runs import Run
from trainer.report.text.comparison_table import combined_table
from trainer.report.text.table import table_of
from trainer.report.verdicts import to_csv
from trainer.rundir.pairs import Pairs

DECAYS = (0.9, 0.97)


def runs_of(
    lr: float, live: list[float], averages: list[list[float]], error: float = 0.005, first: int = 0
) -> list[Run]:
    """One run for each seed; a row of `averages` are the values of one average over the seeds."""
    columns = np.array(averages).T
    errors = np.full(len(averages), error)
    settings = {"optimizer.lr": f"{lr:g}", "trainer.eval_samples": "359"}
    return [
        run_of(value, own, errors, first + seed, DECAYS, **settings)
        for seed, (value, own) in enumerate(zip(live, columns, strict=True))
    ]


def answers(*settings: list[Run]) -> list[Answer]:
    comparison = combine([run for runs in settings for run in runs], "loss")
    assert comparison is not None and comparison.headline == str(comparison.answers[0])
    return comparison.answers


NOISY = runs_of(0.005, [0.20, 0.28, 0.455], [[0.15, 0.17, 0.19], [0.094, 0.103, 0.113]])
"""Live weights with a large spread over seeds, and averages that are far better in each run."""
SLOW = runs_of(0.0005, [1.05, 1.06, 1.04], [[1.07, 1.09, 1.06], [1.1, 1.11, 1.09]])


def test_the_average_of_the_best_setting_has_an_answer_where_the_spread_over_seeds_hides_it() -> None:
    setting, average, which, seeds = answers(NOISY, SLOW)
    assert setting.text.startswith(
        "lr=0.005, 0.1033 ± 0.0095 with EMA 0.97; the least certain is lr=0.0005 (1.0500 ± 0.01 with live"
    )
    assert average.question == "Average or live weights of lr=0.005"
    assert average.text.startswith(
        "the average wins in each of 3 runs, the largest p <0.0001 (over their samples; Bonferroni, 2 averages)"
    )
    assert "p 0.00032 (Bonferroni, 3 weights), 3 seeds)" in setting.text, (
        "each p names what it is adjusted for"
    )
    assert "(Holm, 2 averages) over 3 seeds" in average.text and which.text.endswith(" (unadjusted)")
    assert (
        "against 0.3117 ± 0.13 live; for new seeds it is open: live - EMA +0.21 [" in average.text
        and "over 3 seeds" in average.text
    )
    assert which.text.startswith("EMA 0.97 is clearly better than every other average")
    assert seeds.text == "about 3 more seeds for average or live weights (80 % power, from the spread seen)"


def test_without_a_clear_setting_the_average_still_wins() -> None:
    """Two settings that cannot be separated, each with an average that is clearly better than its live weights."""
    twin = runs_of(0.01, [0.25, 0.24, 0.40], [[0.15, 0.17, 0.19], [0.107, 0.101, 0.106]])
    setting, average, *_ = answers(NOISY, twin)
    assert setting.text.startswith("not clear; lr=0.005, 0.1033") and "not clearly to lr=0.01" in setting.text
    assert average.text.startswith("the average wins")
    assert "Bonferroni, 2 averages; × 2 settings that may be best)" in average.text
    assert setting.more_seeds > 10 and math.isfinite(setting.more_seeds)


def test_an_average_that_loses_in_one_run_is_no_winner() -> None:
    mixed = runs_of(0.005, [0.20, 0.28, 0.455], [[0.15, 0.17, 0.19], [0.094, 0.285, 0.113]])
    assert answers(mixed, SLOW)[1].text.startswith("not clear; EMA 0.97, 0.1640")


def test_live_weights_win_against_every_average() -> None:
    fast = runs_of(0.01, [0.50, 0.51, 0.52], [[0.55, 0.561, 0.57], [0.7, 0.712, 0.72]])
    _, average, which, seeds = answers(fast, SLOW)
    assert average.text.startswith("the live weights win against every average; EMA 0.9, 0.5603")
    assert which.text.startswith("EMA 0.9 is clearly better than every other average")
    assert seeds.text == "none; nothing is open"


@pytest.mark.parametrize(("first", "df"), [(0, 2), (10, 3)])
def test_settings_with_the_same_seeds_are_paired_and_others_are_not(first: int, df: int) -> None:
    """Levels of the seeds that both settings share: only the paired test is clear."""
    levels = [1.0, 2.0, 3.0]
    low = runs_of(0.1, levels, [[v - 0.5 - 0.002 * v for v in levels]])
    high = runs_of(0.2, levels, [[v - 0.3 - 0.001 * v for v in levels]], first=first)
    setting, *_, seeds = answers(low, high)
    assert setting.text.startswith("not clear") == (df == 3)
    assert ("the best setting" in seeds.text) == (df == 3)


def test_one_seed_asks_for_more() -> None:
    setting, average, _, seeds = answers(NOISY[:1], SLOW[:1])
    assert setting.text.endswith("one seed shows no spread over seeds, so it may be chance")
    assert average.text.startswith("the average wins") and "over the samples of one run" in average.text
    assert seeds.text == "2 more seeds of each setting would show the spread over seeds"


def test_forks_have_a_test_of_every_pair_and_ask_for_trainings_from_the_start() -> None:
    """Three forks each, with the pairs of their samples: 0.97 is better than 0.9 in all, or not in the last one."""
    draw = np.random.default_rng(0).normal(0, 0.05, (3, 359))

    def forks(lr: str, *above: float) -> list[Run]:
        found = []
        for number, shift in enumerate(above):
            values = {"live": 1.0 + draw[0], "0.9": 0.8 + shift + draw[1], "0.97": 0.8 + draw[2]}
            means = [float(own.mean()) for own in values.values()]
            pairs = Pairs.of(STEP, {"loss": values})
            settings = {"optimizer.lr": lr, "fork": "base@50", "trainer.eval_samples": "359"}
            found.append(
                run_of(means[0], np.array(means[1:]), np.full(2, 0.004), number, DECAYS, pairs, **settings)
            )
        return found

    _, average, which, seeds = answers(forks("0.1", 0.1, 0.11, 0.12), forks("0.2", 0.2, 0.2, 0.2))
    assert average.text.startswith("the average wins")
    assert "over the samples and the 3 runs of one seed" in average.text
    assert which.text.startswith("EMA 0.97 is clearly better than every other average")
    assert (
        seeds.text
        == "more forks show no spread over seeds; new trainings from the start with other seeds would"
    )
    _, average, which, _ = answers(forks("0.1", 0.1, 0.11, -0.05), forks("0.2", 0.2, 0.2, 0.2))
    assert which.text.startswith(
        "not clear; EMA 0.97 leads, not clearly to EMA 0.9; the least certain: EMA 0.9 -"
    )


@pytest.mark.parametrize("last", [0.05, -0.09])
def test_forks_that_contradict_each_other_are_not_called_each_a_win(last: float) -> None:
    """Their mean is not clear over them, whatever each shows over its samples."""
    forked = runs_of(0.1, [2.0] * 3, [[1.9, 1.99, 2.0 - last]], error=0.001)
    other = runs_of(0.2, [3.0] * 3, [[2.9, 2.9, 2.9]])
    for run in [*forked, *other]:
        run.settings["fork"] = "base@50"
    average = answers(forked, other)[1]
    assert average.text.startswith("the average wins in each of 3 runs" if last > 0 else "not clear; EMA 0.9")


def test_one_more_seed_is_singular() -> None:
    near = runs_of(0.005, [0.21, 0.28, 0.35], [[0.15, 0.17, 0.19], [0.094, 0.103, 0.113]], error=math.nan)
    seeds = answers(near, SLOW)[-1].text
    assert seeds.startswith("about 1 more seed for average or live weights (80 %")


def test_a_setting_with_one_seed_asks_for_more_also_where_other_questions_have_a_number() -> None:
    _, average, _, seeds = answers(NOISY, SLOW[:1])
    assert average.more_seeds > 1 and math.isfinite(average.more_seeds)
    assert seeds.text == "2 more seeds of each setting would show the spread over seeds"


def test_values_that_are_equal_for_every_seed_promise_no_number_of_seeds() -> None:
    """Accuracies of three seeds that are all the same: more seeds may show nothing either."""
    same = [runs_of(rate, [0.9] * 3, [[0.9] * 3, [0.9] * 3]) for rate in (0.1, 0.2)]
    setting, *_, seeds = answers(*same)
    assert setting.text.endswith("the difference has no spread over seeds, so it is not tested")
    every = "the best setting, average or live weights, which average"
    assert seeds.text == f"unknown for {every}, because there is no spread over seeds"


def test_an_average_of_live_weights_that_diverged_is_not_called_missing() -> None:
    diverged = runs_of(0.005, [0.20, math.inf, 0.455], [[0.15, 0.17, 0.19], [0.094, 0.103, 0.113]])
    average = answers(diverged, SLOW)[1]
    assert average.text == "the live weights have no finite value to compare with"


def test_each_gap_has_one_p_on_the_first_screen_and_its_adjustment_in_table_and_files() -> None:
    several, single = combine([*NOISY, *SLOW], "loss"), combine(NOISY[:1], "loss")
    assert several is not None and single is not None
    gap = "live - EMA 0.97 [95 % CI]"
    assert " p " not in dict(first_screen(several, []).facts)[gap], "the answers have it"
    assert dict(first_screen(single, []).facts)[gap].endswith(" p <0.0001 (Holm, 2 averages)")
    notes = combined_table(several).notes
    assert any("p adjusted for 2 averages (Holm)" in note for note in table_of(NOISY[0], "loss").notes)
    assert "p here is within a group; the answers above also adjust for the choice of the group." in notes
    lines = list(csv.DictReader(to_csv(single.rows[0]).splitlines()))
    assert [line["p_adjusted_for"] for line in lines] == ["", "Holm, 2 averages", "Holm, 2 averages"]
