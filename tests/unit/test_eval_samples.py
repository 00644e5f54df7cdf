"""The number of samples of `trainer.eval_samples=auto`."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from launch.evaluate import AUTO, with_number
from tests.makers import refusal_of
from tests.nulls import Simulation, has_winner
from tests.simulated import DENSE, one_run
from trainer.evaluation.enough import Enough, samples_for
from trainer.report.group import Group
from trainer.report.pairs import needed
from trainer.report.runs import Run
from trainer.report.statistics import ALPHA
from trainer.report.verdicts import rows_of

FACTS = {"primary_metric": "loss", "higher_is_better": [], "num_samples": 64}


def test_as_many_samples_as_the_run_used_where_the_best_is_clear() -> None:
    clear = one_run(np.random.default_rng(0), 128, np.array([-0.2, -0.4, -0.2, 0.2, 0.4]), DENSE)
    assert samples_for(clear) == 128


def test_the_number_separates_two_close_averages_and_has_a_bound() -> None:
    random = np.random.default_rng(0)
    close = np.array([-0.3, -0.31, -0.1, 0.2, 0.4])

    def is_clear(run: Run) -> bool:
        (best,) = [row for row in rows_of(run, "loss") if row.rival]
        assert best.rival is not None
        return best.weights == "0.97" and best.rival.gap.p <= ALPHA

    open_questions = answered = 0
    for _ in range(60):
        run = one_run(random, 64, close, DENSE)
        number = samples_for(run)
        assert 64 <= number <= 16 * 64
        if not is_clear(run) and number > 64:
            open_questions += 1
            answered += is_clear(one_run(random, number, close, DENSE))
    # With 64 samples the difference is 1.3 standard errors, which every fourth evaluation finds.
    assert open_questions >= 20 and answered >= 0.6 * open_questions
    equal = one_run(random, 64, np.zeros(5), DENSE)
    assert samples_for(equal) <= 16 * 64


def test_the_gap_to_the_live_weights_is_to_be_clear_after_the_adjustment_for_all_averages() -> None:
    random, checked = np.random.default_rng(0), 0
    for _ in range(40):
        run = one_run(random, 64, np.array([-0.03, 1.0, 1.0, 1.0, 1.0]), DENSE)
        best = next(row for row in rows_of(run, "loss") if row.weights == "0.9")
        assert best.last.gap is not None
        if best.last.p > ALPHA and best.last.gap.mean > 0:
            wanted = needed(best.last.gap, ALPHA / 5)
            assert samples_for(run) == min(16 * 64, max(64, wanted))
            checked += wanted < 16 * 64
    assert checked >= 5


def test_a_run_without_pairs_is_refused_and_other_overrides_stay(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"train/step": 1, "eval/live/loss": 2, "eval/ema/0.9/loss": 1}\n'
    )
    assert refusal_of(with_number, tmp_path, [AUTO]).startswith(
        "trainer.eval_samples=auto: expected a run with"
    )
    assert with_number(tmp_path, ["trainer.eval_samples=8"]) == ["trainer.eval_samples=8"]


def extended(random: np.random.Generator, shift: np.ndarray) -> tuple[Run, int]:
    """A run whose last evaluation took further samples, and their number."""
    run = one_run(random, 64, shift, DENSE)
    assert run.pairs is not None
    record = {key: float(series.values[-1]) for key, series in run.columns.items()}
    count = Enough(FACTS, 10_000).further(record, run.pairs)
    more = one_run(random, count, shift, DENSE).pairs
    assert more is not None
    return replace(run, pairs=replace(run.pairs, further=more.metrics)), count


def test_further_samples_claim_no_difference_that_does_not_exist() -> None:
    """One average and no difference: the first 64 samples with the further ones would claim one in 12 % of runs."""
    random = np.random.default_rng(0)
    found = [extended(random, np.zeros(1)) for _ in range(400)]
    assert sum(has_winner(Simulation([run])) for run, _ in found) <= 400 * (
        ALPHA + 2.5 * (0.05 * 0.95 / 400) ** 0.5
    )
    assert 64 <= min(count for _, count in found) < max(count for _, count in found) == 16 * 64


def test_further_samples_decide_the_verdicts_of_a_run_alone_and_never_against_other_runs() -> None:
    run, count = extended(np.random.default_rng(0), np.array([-0.3, -0.31, -0.1, 0.2, 0.4]))
    assert run.pairs is not None and count >= 64
    rows = {row.weights: row for row in rows_of(run, "loss")}
    means = dict(zip(run.pairs.further["loss"].weights, run.pairs.further["loss"].means, strict=True))
    assert {name: row.last.value for name, row in rows.items()} == means
    best = rows[min(means, key=means.__getitem__)]
    assert best.rival is not None and best.rival.gap.df == count - 1 == best.last.gap.df  # type: ignore[union-attr]
    assert (
        best.best is not None and best.best.value == run.columns[f"eval/ema/{best.weights}/loss"].values[-1]
    )
    compared = rows_of(Group("one", [run], short_settings={"lr": "1"}), "loss")
    assert [row.last.value for row in compared] == [
        own.values[-1] for key, own in run.columns.items() if key in ("eval/live/loss",) or "eval/ema/" in key
    ]


def test_no_further_samples_beyond_the_split_or_without_a_finite_average() -> None:
    run = one_run(np.random.default_rng(0), 64, np.zeros(5), DENSE)
    assert run.pairs is not None
    record = {key: float(series.values[-1]) for key, series in run.columns.items()}
    assert Enough(FACTS, 100).further(record, run.pairs) == 100
    lost = {key: value if "/live/" in key else float("nan") for key, value in record.items()}
    assert Enough(FACTS, 100).further(lost, run.pairs) == 0
    Enough(FACTS, 100).refuse_without({"loss": 0})
    assert "expected a number" in refusal_of(Enough(FACTS, 100).refuse_without, {"accuracy": 0})
    biased = FACTS | {"direction_undeclared": ["loss"]}
    assert "expected a number" in refusal_of(Enough(biased, 100).refuse_without, {"loss": 0})
