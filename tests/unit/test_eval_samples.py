"""The number of samples of `trainer.eval_samples=auto`."""

from pathlib import Path

import numpy as np

from launch.evaluating.samples import AUTO, samples_for, with_number
from tests.makers import refusal_of
from tests.nulls import DENSE, one_run
from trainer.report.runs import Run
from trainer.report.statistics import ALPHA
from trainer.report.verdicts import rows_of


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


def test_a_run_without_pairs_is_refused_and_other_overrides_stay(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"train/step": 1, "eval/live/loss": 2, "eval/ema/0.9/loss": 1}\n'
    )
    assert refusal_of(with_number, tmp_path, [AUTO]).startswith(
        "trainer.eval_samples=auto: expected a run with"
    )
    assert with_number(tmp_path, ["trainer.eval_samples=8"]) == ["trainer.eval_samples=8"]
