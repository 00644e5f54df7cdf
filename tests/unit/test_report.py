"""Tables, pictures and the page of one run.

The run below is made up so that each verdict can be read off: with gap g and standard error s of a large sample an
average is better or worse than the live weights if its two-sided p-value of g / s, times the number of averages not yet
decided (Holm), is at most 0.05. Of three averages that is 2.39 s for the first; a 95 % interval is 1.96 s to each side.
"""

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.one_run import AVERAGES, make_run
from trainer.report import read_run
from trainer.report.format import format_interval, format_p
from trainer.report.headline import headline
from trainer.report.statistics import Estimate
from trainer.report.text.table import Line, Table, gap_meaning, table_of, to_markdown
from trainer.report.text.terminal import print_tables
from trainer.report.verdicts import Row, best_of, rows_of, verdict


def rows(run_dir: Path) -> dict[str, Row]:
    return {row.weights: row for row in rows_of(read_run(run_dir), "loss")}


def test_rows_hold_last_and_best_with_their_gaps(tmp_path: Path) -> None:
    found = rows(make_run(tmp_path))
    assert list(found) == ["live", "0.9", "0.99", "0.9999"]
    live, middle = found["live"], found["0.99"]
    assert live.best is not None and (live.last.value, live.best.value, live.best_steps) == (
        2.1,
        2.0,
        (200, 200),
    )
    assert (live.last.gap, live.last.verdict) == (None, "")
    assert (middle.last_step, middle.last.value) == (300, 2.095)
    assert middle.last.gap == Estimate(pytest.approx(0.005), 0.02, math.inf)
    assert middle.best is not None and middle.best.value == 1.9 and middle.best_steps == (200, 200)
    assert middle.best.gap == Estimate(pytest.approx(0.1), 0.02, math.inf)


VERDICTS = ["", "better", "no clear difference", "worse"]


def test_the_winner_is_the_best_at_the_last_evaluation_and_clearly_so(tmp_path: Path) -> None:
    found = rows(make_run(tmp_path))
    assert [name for name, row in found.items() if row.last.winner] == ["0.9"]
    assert [name for name, row in found.items() if row.best_of_all] == ["0.99"]
    assert [row.last.verdict for row in found.values()] == VERDICTS
    # The best step of one run is chosen by looking: nothing is claimed there.
    assert not any(row.best and (row.best.winner or row.best.verdict) for row in found.values())
    # 0.99 is 0.095 behind 0.9, and the error of their difference at most 0.04: 2.375 of them, with two comparisons.
    assert [name for name, row in found.items() if row.may_be_best] == ["0.9"]


def test_there_is_no_winner_within_the_noise(tmp_path: Path) -> None:
    # 0.9 is the best by 0.1 = 2.33 standard errors: p 0.0198 alone, 0.0594 for the best of three.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AVERAGES, "0.9", (AVERAGES["0.9"][0], 0.1 / 2.33))
        patch.setitem(AVERAGES, "0.9999", ((5.0, 4.9, 2.11), 0.02))
        run_dir = make_run(tmp_path)
    found = rows(run_dir)
    assert not any(row.last.winner for row in found.values())
    assert found["0.9"].last.p == pytest.approx(3 * 0.0198, abs=1e-3)
    table = table_of(read_run(run_dir), "loss")
    assert table.headline.startswith(
        "No clear winner by loss (lower is better) at step 300: EMA 0.9 is best with 2.0000 against 2.1000 live; "
        "live - EMA +0.100 [0.016, 0.184], p 0.059 (Holm, 3 averages)."
    )
    assert not any(line.marked for line in table.lines)


def test_a_metric_that_should_rise_turns_everything_round(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, sign=-1.0, meta={"higher_is_better": ["loss"]})
    found = rows(run_dir)
    assert [name for name, row in found.items() if row.last.winner] == ["0.9"]
    assert [row.last.verdict for row in found.values()] == VERDICTS
    assert found["live"].best is not None and found["live"].best.value == -2.0
    assert found["0.9"].last.gap == Estimate(pytest.approx(-0.1), 0.02, math.inf)
    text = to_markdown(table_of(read_run(run_dir), "loss"))
    assert "Higher is better. live - EMA, below 0: EMA is better." in text
    assert "EMA 0.9 wins by loss (higher is better) at step 300" in text


def test_which_sign_is_good_is_said() -> None:
    assert gap_meaning(False) == "live - EMA, above 0: EMA is better"
    assert gap_meaning(True) == "live - EMA, below 0: EMA is better"
    assert gap_meaning(None) == "live - EMA shows which is higher, not which is better"


@pytest.mark.parametrize(
    ("gap", "p", "higher", "expected"),
    [
        (0.2, 0.06, False, "no clear difference"),
        (0.2, 0.05, False, "better"),
        (-0.2, 0.05, False, "worse"),
        (-0.2, 0.05, True, "better"),
        (0.2, 0.05, True, "worse"),
        (0.2, 0.05, None, "different"),
        (0.2, math.nan, False, "no standard error"),
        (math.nan, math.nan, False, "not finite"),
        (None, math.nan, False, ""),
    ],
)
def test_a_verdict_needs_an_adjusted_p_value_and_a_direction(
    gap: float | None, p: float, higher: bool | None, expected: str
) -> None:
    assert verdict(None if gap is None else Estimate(gap, 0.1, 10), p, higher) == expected


def test_a_diverged_average_never_wins(tmp_path: Path) -> None:
    make_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(
            '{"train/step": 400, "eval/live/loss": 2.095, "eval/ema/0.9/loss": null, "eval/gap/0.9/loss": null}\n'
        )
    found = rows(tmp_path)
    assert not any(row.last.winner for row in found.values()), "live has no finite average to beat"
    assert found["0.9"].last.verdict == "not finite"
    assert found["0.9"].best is not None and found["0.9"].best.value == 1.95
    assert found["0.99"].last.verdict == "not in every last evaluation"
    # The other averages were last evaluated at step 300: no part in the decision, though 0.99 had this value
    # too, and the table says so.
    assert "2.0950 (step 300)" in to_markdown(table_of(read_run(tmp_path), "loss"))


def test_nan_is_never_the_best() -> None:
    # min() and max() keep a NaN that they meet first.
    assert best_of([math.nan, 2.0, 1.0, math.inf], False) == 1.0
    assert best_of([math.nan, 1.0, 2.0, math.inf], True) == 2.0
    assert best_of([math.nan], False) is None


def test_the_headline_says_who_won_and_by_how_much(tmp_path: Path) -> None:
    found = rows(make_run(tmp_path))
    assert headline(list(found.values()), False) == (
        "EMA 0.9 wins by loss (lower is better) at step 300: 2.0000 against 2.1000 live; "
        "live - EMA +0.100 [0.061, 0.139], p <0.0001 (Holm, 3 averages)."
    )
    won = replace(found["live"], last=replace(found["live"].last, winner=True))
    assert headline([won, found["0.9999"]], False) == (
        "The live weights win by loss (lower is better) at step 300: 2.1000, and EMA 0.9999 is worse."
    )
    other = replace(found["0.9999"], weights="ema/0.5")
    assert headline([won, found["0.9999"], other], False).endswith("and all 2 averages are worse.")
    assert headline([found["live"], found["0.9999"]], False) == (
        "No clear winner by loss (lower is better) at step 300: live is best with 2.1000, but EMA 0.9999 is not clearly"
        " worse."
    )
    undecided = headline([found["live"], found["0.9999"], other], False)
    assert undecided.endswith("live is best with 2.1000, but at least one average is not clearly worse.")
    assert headline([found["live"]], False).startswith("Nothing to compare with by loss")
    assert headline([], False) == "No evaluation to compare yet."


def test_gaps_have_the_decimals_of_their_interval() -> None:
    assert format_interval(Estimate(0.05213, 0.00312, math.inf)) == "+0.0521 [0.0460, 0.0582]"
    assert format_interval(Estimate(-12.3, 4.56, math.inf)) == "-12.3 [-21.2, -3.4]"
    assert format_interval(Estimate(5.1e-7, 6.6e-8, math.inf)) == "+5.1e-07 [3.8e-07, 6.4e-07]"
    assert format_interval(Estimate(0.5, math.nan, 1)) == "+0.5000"
    assert format_interval(Estimate(0.0, 0.0, 10)) == "+0.0000"
    assert (
        format_interval(Estimate(5.0, 1e-17, 10)) == "+5.0000"
    )  # an interval that a float cannot tell from its middle
    assert format_interval(None) == "-"
    assert [format_p(p) for p in (math.nan, 1e-5, 0.01234, 1.0)] == ["-", "<0.0001", "0.012", "1"]


def test_markdown_has_the_winner_in_bold(tmp_path: Path) -> None:
    lines = to_markdown(table_of(read_run(make_run(tmp_path)), "loss")).splitlines()
    assert [line for line in lines if "**" in line] == [
        "| **EMA 0.9** | **2.0000** | **+0.100 [0.061, 0.139]** | **<0.0001** | **better** "
        "| **1.9500** | **200** | **+0.050 [0.011, 0.089]** |"
    ]


def test_printing_takes_no_more_than_120_columns_and_leaves_the_rest_to_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = table_of(read_run(make_run(tmp_path)), "loss")
    print_tables([table])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and max(map(len, printed.splitlines())) <= 120
    assert re.search(r"> EMA 0\.9 .* \+0\.100 \[0\.061, 0\.139\] +<0\.0001 +better +1\.9500 +200\n", printed)
    # The gap at the best step is in the files alone.
    assert "[0.011, 0.089]" in to_markdown(table) and "[0.011, 0.089]" not in printed


def test_a_table_that_needs_more_than_120_columns_gets_them_outside_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    number, words = "1.234567890 ± 0.123456", "no clear difference"
    heads = [f"head {n}" for n in range(7)]
    print_tables([Table("wide", heads, [Line([words, *[number] * 6], [words, *[1.0] * 6])])])
    row = next(line for line in capsys.readouterr().out.splitlines() if number in line)
    assert row.count(number) == 6 and len(row) > 120


def test_words_break_before_numbers_do(capsys: pytest.CaptureFixture[str]) -> None:
    number, words = "1.234567890 ± 0.123456", "no clear difference at all"
    heads = [f"head {n}" for n in range(5)]
    print_tables([Table("2 too wide", heads, [Line([words, *[number] * 4], [words, *[1.0] * 4])])])
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) == 120
    assert [line.count(number) for line in printed if number in line] == [4]


def test_a_best_step_that_is_the_last_one_is_not_printed_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"train/step": 10, "eval/live/loss": 2.0, "eval/ema/0.9/loss": 1.9, "eval/gap/0.9/loss": 0.1}\n'
    )
    print_tables([table_of(read_run(tmp_path), "loss")])
    printed = capsys.readouterr().out
    assert printed.count("1.9000") == 2, "in the headline and in the table"
    assert "No weights were better at an earlier evaluation" in printed


def test_where_a_terminal_is_too_narrow_numbers_break_and_are_not_cut(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "60")
        patch.setenv("TERM", "xterm")
        stream = Terminal()
        print_tables([table_of(read_run(make_run(tmp_path)), "loss")], stream)
    printed = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())
    assert max(map(len, printed.splitlines())) <= 60
    assert "…" not in printed and all(text in printed for text in ("+0.100", "[0.061,", "0.139]", "<0.0001"))


def test_a_metric_without_a_declared_direction_has_no_winner(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, meta={"higher_is_better": [], "direction_undeclared": ["loss"]})
    table = table_of(read_run(run_dir), "loss")
    assert table.headline == "No winner by loss: no direction was declared, or the estimate is biased."
    assert table.notes[0].startswith("No verdict. live - EMA shows which is higher")
    assert [line.cells[4] for line in table.lines] == ["-", "different", "no clear difference", "different"]
    assert not any(line.marked for line in table.lines)


@pytest.mark.parametrize(
    ("slope", "text"),
    [
        (
            2.04,
            "The weights still move: a longer average would lag (‖EMA - live‖² grows with the horizon to the power 2.0,"
            " step 400).",
        ),
        (
            1.1,
            "The weights wander: a longer average would lag more, and take out more noise (‖EMA - live‖² grows with the"
            " horizon to the power 1.1, step 400).",
        ),
        (
            -0.1,
            "The weights move around one place: a longer average would not lag (‖EMA - live‖² grows with the horizon"
            " to the power -0.1, step 400).",
        ),
    ],
)
def test_the_slope_over_decays_is_explained_in_words(tmp_path: Path, slope: float, text: str) -> None:
    make_run(tmp_path)
    assert "to the power" not in to_markdown(table_of(read_run(tmp_path), "loss"))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"train/step": 400, "ema/slope": slope}) + "\n")
        file.write(json.dumps({"train/step": 500, "ema/slope": None}) + "\n")
    run = read_run(tmp_path)
    assert text in to_markdown(table_of(run, "loss"))
    assert run.averages == list(AVERAGES)
    assert not table_of(run, "accuracy").notes
