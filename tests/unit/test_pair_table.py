"""Every pair of weights in a report: its paired difference, its verdict, and how many samples it takes."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.simulated import DENSE, one_run
from trainer.report.group import Group
from trainer.report.headline import headline
from trainer.report.pairs import needed
from trainer.report.runs import Run
from trainer.report.statistics import ALPHA, Estimate
from trainer.report.text.pair_table import pair_table
from trainer.report.text.table import Table, table_of
from trainer.report.verdicts import rows_of

SHARE = {"eval_fraction": 0.1}
SHIFTS = np.array([-0.2, -0.25, -0.1, 0.2, 0.4])


def made(samples: int = 256, shifts: np.ndarray = SHIFTS) -> Run:
    return one_run(np.random.default_rng(0), samples, shifts, DENSE)


def table(run: Run) -> Table:
    found = pair_table(run, "loss")
    assert found is not None
    return found


def test_the_table_has_the_paired_difference_and_the_verdict_of_every_pair() -> None:
    run = made()
    found = table(run)
    assert found.headers == ["row - column", "live", *(f"EMA {decay:g}" for decay in DENSE)]
    values = {row.weights: row.last.value for row in rows_of(run, "loss")}
    for line in found.lines:
        name = str(line.keys[0])
        for other, cell, key in zip(values, line.cells[1:], line.keys[1:], strict=True):
            if name == other:
                assert (cell, key) == ("-", None)
                continue
            assert key == pytest.approx(values[name] - values[other], abs=1e-12)
            assert cell.endswith("better" if values[name] < values[other] else "worse")
            assert " ± 0.0" in cell
    assert found.lines[2].marked and "adjusted for all 15 pairs" in found.notes[0]


def test_equal_averages_get_a_p_value_and_no_verdict() -> None:
    equal = table(made(shifts=np.zeros(5)))
    assert all("(p " in cell for line in equal.lines[1:] for cell in line.cells[2:] if cell != "-")


@pytest.mark.parametrize(
    ("split", "data", "enough"),
    [
        (None, {}, " samples (trainer.eval_samples) would show a difference of this size (80 % power)."),
        (10**9, {}, " samples (trainer.eval_samples) would show a difference of this size (80 % power)."),
        (1400, SHARE, "but the evaluation split has only 1,400 (data.eval_fraction, or more data)."),
        (1400, SHARE | {"eval_path": "b"}, "but the evaluation split has only 1,400."),
        (1400, {}, "but the evaluation split has only 1,400."),
    ],
)
def test_the_headline_names_the_best_average_over_the_closest_one_or_how_many_samples_it_takes(
    split: int | None, data: dict[str, Any], enough: str
) -> None:
    apart = table_of(made(), "loss").headline
    assert "EMA 0.97 wins by loss" in apart
    assert (
        "It is clearly better than every other average; the least certain: EMA 0.9 - EMA 0.97 +0.0" in apart
    )
    run = made(shifts=SHIFTS + np.array([-0.0497, 0, 0, 0, 0]))
    run = replace(run, meta=run.meta | {"split_samples": split})
    run.__dict__["config"] = {"data": data}  # in place of reading it
    close = table_of(run, "loss").headline
    assert "Not clearly worse than it: EMA 0.9; the least certain: EMA 0.9 - EMA 0.97 " in close
    assert enough in close


def test_the_optimum_is_named_with_an_interval_narrower_than_the_tested_decays() -> None:
    (note,) = [note for note in table_of(made(), "loss").notes if note.startswith("Best tested decay")]
    assert (
        "0.97; the optimum is between 0.9" in note and "smooth curves through 0.9, 0.97, 0.99 (95 %)" in note
    )


def test_a_worse_average_of_the_same_horizon_is_no_end_of_the_interval() -> None:
    run = made()
    run.columns["ema/0.9/decay"] = run.columns["ema/0.97/decay"]
    (note,) = [note for note in table_of(run, "loss").notes if note.startswith("Best tested decay")]
    assert (
        note
        == "Best tested decay 0.97; the optimum is below 0.99; no shorter average is clearly worse (95 %)."
    )


@pytest.mark.parametrize("share", [0.1, 1.0, 2.0])
def test_the_stated_number_of_samples_finds_the_difference_in_80_per_cent(share: float) -> None:
    random = np.random.default_rng(1)
    samples = round(needed(Estimate(share, 1 / np.sqrt(50), 49)))
    drawn = random.normal(share, 1, (2000, samples))
    errors = drawn.std(axis=1, ddof=1) / np.sqrt(samples)
    found = [
        Estimate(float(mean), float(se), samples - 1).p <= ALPHA
        for mean, se in zip(drawn.mean(axis=1), errors, strict=True)
    ]
    # Rather more than less where only a few samples are needed.
    assert 0.76 <= np.mean(found) <= (0.84 if samples > 10 else 0.92)


def test_a_run_without_pairs_or_with_those_of_other_records_falls_back_to_the_gaps() -> None:
    run = made()
    assert run.pairs is not None
    moments = run.pairs.metrics["loss"]
    other_values = replace(run.pairs, metrics={"loss": replace(moments, means=moments.means + 0.001)})
    for pairs in (None, replace(run.pairs, step=run.pairs.step - 1), other_values):
        old = replace(run, pairs=pairs)
        old.__dict__["settings"] = run.settings
        assert pair_table(old, "loss") is None
        assert all(row.rival is None for row in rows_of(old, "loss"))
        assert "the least certain" not in headline(rows_of(old, "loss"), higher_is_better=False)
    old = replace(run, pairs=None)
    old.__dict__["settings"] = run.settings
    assert "Without pairs.jsonl, averages are compared only through" in " ".join(table_of(old, "loss").notes)


def test_seeds_have_a_table_of_pairs_too() -> None:
    runs = []
    for seed in range(5):
        run = one_run(np.random.default_rng(seed), 64, SHIFTS, DENSE)
        run.__dict__["settings"] = {"seed": str(seed)}
        runs.append(run)
    found = pair_table(Group("all", runs), "loss")
    assert found is not None and "on the same 5 seeds" in found.notes[0]


@pytest.mark.parametrize("difference", [0.0, 1e-160, -1e-300])
def test_a_difference_far_below_its_error_takes_infinitely_many_samples(difference: float) -> None:
    assert needed(Estimate(difference, 1.0, 49)) == math.inf
