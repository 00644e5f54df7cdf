"""Tables, pictures and the page of one run.

The run below is made up so that each verdict can be read off: with gap g and standard error s of a large sample an
average is better or worse than the live weights if its two-sided p-value of g / s, times the number of averages not yet
decided (Holm), is at most 0.05. Of three averages that is 2.39 s for the first; a 95 % interval is 1.96 s to each side.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from trainer.report import decay_plots, plots, read_run, write_report
from trainer.report.grid import write_grid
from trainer.report.plots import focus
from trainer.report.records import Series
from trainer.report.rows import Row, best_of, rows_of, verdict
from trainer.report.significance import Estimate
from trainer.report.style import DPI, RC, WIDTH_IN, line_style
from trainer.report.table import (
    Line,
    Table,
    gap_meaning,
    headline,
    interval_text,
    p_text,
    table_of,
    to_markdown,
)
from trainer.report.terminal import print_tables

STEPS = (100, 200, 300)
LIVE = (3.0, 2.0, 2.1)
AVERAGES = {  # values, and the standard error of each gap
    "0.9": ((2.9, 1.95, 2.0), 0.02),  # ends 0.1 below live: better
    "0.99": ((3.5, 1.90, 2.095), 0.02),  # ends 0.005 below live: within 2 SE; its step 200 is the best of all
    "0.9999": ((5.0, 4.9, 4.8), 0.02),  # worse
}


def make_run(run_dir: Path, *, meta: dict[str, object] | None = None, sign: float = 1.0) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "metrics.jsonl").open("w") as file:
        for place, step in enumerate(STEPS):
            record = {"train/step": step, "train/loss": 2.0, "eval/live/loss": sign * LIVE[place]}
            for name, (values, error) in AVERAGES.items():
                record |= {
                    f"eval/ema/{name}/loss": sign * values[place],
                    f"eval/gap/{name}/loss": sign * (LIVE[place] - values[place]),
                    f"eval/gap/{name}/loss_se": error,
                    f"ema/{name}/decay": float(name),
                    f"ema/{name}/rel_l2": 0.01 * step * (1 - float(name)),
                }
            file.write(json.dumps(record) + "\n")
    (run_dir / "config.yaml").write_text("note: <script>alert(1)</script>\n")
    (run_dir / "overrides.yaml").write_text("- experiment=quickstart\n")
    (run_dir / "meta.json").write_text(json.dumps({"host": "<img src=x>"} | (meta or {})))
    return run_dir


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


def test_nobody_wins_within_the_noise(tmp_path: Path) -> None:
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
        "live - EMA +0.100 [0.016, 0.184], p 0.059, adjusted for 3 averages."
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
    assert gap_meaning(None) == "live - EMA tells which is higher, not which is better"


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
    assert not any(row.last.winner for row in found.values()), "live beat nobody"
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
        "live - EMA +0.100 [0.061, 0.139], p <0.0001, adjusted for 3 averages."
    )
    won = replace(found["live"], last=replace(found["live"].last, winner=True))
    assert headline([won, found["0.9999"]], False) == (
        "The live weights win by loss (lower is better) at step 300: 2.1000, and every average is worse (1)."
    )
    assert headline([found["live"], found["0.9999"]], False).startswith("No clear winner by loss")
    assert headline([found["live"]], False).startswith("Nothing to compare with by loss")
    assert headline([], False) == "No evaluation to compare yet."


def test_gaps_have_the_decimals_of_their_interval() -> None:
    assert interval_text(Estimate(0.05213, 0.00312, math.inf)) == "+0.0521 [0.0460, 0.0582]"
    assert interval_text(Estimate(-12.3, 4.56, math.inf)) == "-12.3 [-21.2, -3.4]"
    assert interval_text(Estimate(5.1e-7, 6.6e-8, math.inf)) == "+5.10e-07 [3.81e-07, 6.39e-07]"
    assert interval_text(Estimate(0.5, math.nan, 1)) == "+0.5000"
    assert interval_text(Estimate(0.0, 0.0, 10)) == "+0.0000"
    assert (
        interval_text(Estimate(5.0, 1e-17, 10)) == "+5.0000"
    )  # an interval that a float cannot tell from its middle
    assert interval_text(None) == "-"
    assert [p_text(p) for p in (math.nan, 1e-5, 0.01234, 1.0)] == ["-", "<0.0001", "0.012", "1"]


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
    assert "none was better at an earlier evaluation" in printed


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


def test_nobody_is_better_by_a_metric_whose_direction_nobody_declared(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, meta={"higher_is_better": [], "direction_undeclared": ["loss"]})
    table = table_of(read_run(run_dir), "loss")
    assert table.headline == "No winner by loss: nobody declared whether higher or lower is better."
    assert table.notes[0].startswith("Direction not declared. live - EMA tells which is higher")
    assert [line.cells[4] for line in table.lines] == ["-", "different", "no clear difference", "different"]
    assert not any(line.marked for line in table.lines)


class Page(HTMLParser):
    """Tags, their addresses and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.winners: list[str] = []
        self._winner = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        self._winner = self._winner or (tag == "tr" and ("class", "winner") in attributes)

    def handle_data(self, data: str) -> None:
        if self._winner and data.strip():
            self.winners.append(data)
            self._winner = False


def test_a_report_is_all_its_files_and_a_page_that_needs_no_other(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    write_grid(run_dir / "report" / "samples.png", np.zeros((4, 1, 8, 8)), {"0.9": np.ones((4, 1, 8, 8))})
    paths = write_report(run_dir)
    names = {path.name for path in (run_dir / "report").iterdir()}
    pictures = {"curves.png", "loss_over_decay.png", "divergence.png", "heat_map.png", "samples.png"}
    assert names == {"index.html", "table.md", "table.csv"} | pictures
    for path in (paths.curves, paths.loss_over_decay, paths.divergence, paths.heat_map):
        assert path is not None
        with Image.open(path) as picture:
            picture.verify()

    text = paths.page.read_text()
    page = Page(text)
    assert page.tags.count("img") == 5 and page.tags.count("script") == 1
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "&lt;img src=x&gt;" in text
    assert page.winners == ["EMA 0.9"]
    assert "experiment=quickstart" in text

    with paths.csv.open() as file:
        table = {row["weights"]: row for row in csv.DictReader(file)}
    assert float(table["0.9"]["gap"]) == LIVE[2] - 2.0
    assert (table["live"]["gap"], table["0.9"]["winner"]) == ("", "True")


def test_a_report_can_be_made_again(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    before = write_report(run_dir).page.read_bytes()
    assert write_report(run_dir).page.read_bytes() == before


def test_the_page_of_a_run_that_was_carried_on_has_its_last_configuration(tmp_path: Path) -> None:
    session = {"overrides": ["trainer.steps=900"], "config": "trainer:\n  steps: 900\n", "argv": []}
    text = write_report(make_run(tmp_path, meta={"resumed": [session]})).page.read_text()
    assert "Overrides of session 2</summary>\n<pre>trainer.steps=900</pre>" in text
    assert "Configuration of the last session</summary>\n<pre>trainer:\n  steps: 900" in text
    assert "alert(1)" not in text, "the configuration of the first session"


def test_a_run_without_an_evaluation_gets_a_report_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"train/step": 10, "train/loss": 2.0}\n')
    paths = write_report(tmp_path)
    assert (paths.curves, paths.loss_over_decay, paths.divergence, paths.heat_map) == (None,) * 4
    assert "No evaluation to compare yet." in paths.page.read_text()


def test_a_run_with_nothing_but_live_weights_gets_curves(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"train/step": 10, "eval/live/loss": 2.0}\n')
    paths = write_report(tmp_path)
    assert paths.curves is not None and paths.divergence is None


def drawn(patch: pytest.MonkeyPatch, work: Callable[[], object]) -> list[Figure]:
    """The figures that `work` draws, instead of files."""
    figures: list[Figure] = []

    def keep(path: Path, draw: Callable[[Figure], None], *, height: float) -> None:
        with rc_context(RC):
            figures.append(Figure(figsize=(WIDTH_IN, height), dpi=DPI))
            FigureCanvasAgg(figures[-1])
            draw(figures[-1])
            figures[-1].draw_without_rendering()

    for module in (plots, decay_plots):
        patch.setattr(module, "save", keep)
    work()
    return figures


def test_one_evaluation_is_drawn_as_one_place_for_each_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an axis of steps all would stand above one another, and ticks at 37.5 and 42.5 say nothing."""
    record = {"train/step": 40, "eval/live/loss": 2.0}
    for name, value in (("0.9", 1.9), ("0.99", 4.0)):
        record |= {f"eval/ema/{name}/loss": value, f"eval/gap/{name}/loss": 2 - value}
        record |= {f"eval/gap/{name}/loss_se": 0.01}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    curves, gaps = drawn(monkeypatch, lambda: write_report(tmp_path))[0].axes
    found = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in curves.lines[:3]}
    assert found == {"live": (0, 2.0), "EMA 0.9": (1, 1.9), "EMA 0.99": (2, 4.0)}
    assert [text.get_text() for text in gaps.get_xticklabels()] == ["live", "EMA 0.9", "EMA 0.99"]
    assert gaps.get_xlabel() == "the only evaluation: step 40"
    assert curves.get_ylim()[1] > 4.0, "nothing is off the axis"


def test_every_label_of_a_picture_is_on_it_and_beside_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room is reckoned from the number of characters: measured here, for numbers and names that need much of it."""
    meta: dict[str, object] = {"metric_units": {"loss": "nats per token"}, "higher_is_better": []}
    run_dir = make_run(tmp_path, meta=meta)
    text = (run_dir / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    for record in lines:
        tiny = {
            key.replace("/loss", "/tiny"): 1e-5 * value for key, value in record.items() if "/loss" in key
        }
        large = {
            key.replace("/loss", "/large"): -9e5 * value for key, value in record.items() if "/loss" in key
        }
        record |= tiny | large
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    figures = drawn(monkeypatch, lambda: write_report(run_dir))
    assert len(figures) == 5
    for figure in figures:
        hidden = beyond(figure)
        boxes = [
            (text.get_text(), text.get_window_extent())
            for text in figure.findobj(Text)
            if text.get_visible() and text.get_text() and text not in hidden
        ]
        for told, box in boxes:
            inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
            assert inside, f"{told!r} is cut"
        for place, (told, box) in enumerate(boxes):
            for other, beside in boxes[:place]:
                shrunk = Bbox.from_extents(box.x0 + 1, box.y0 + 1, box.x1 - 1, box.y1 - 1)
                assert not shrunk.overlaps(beside), f"{told!r} lies on {other!r}"
            for axes in figure.axes:
                inner = Bbox.from_extents(
                    axes.bbox.x0 + 4, axes.bbox.y0 + 4, axes.bbox.x1 - 4, axes.bbox.y1 - 4
                )
                assert not inner.overlaps(box), f"{told!r} lies on a panel"


def beyond(figure: Figure) -> set[Text]:
    """Labels of ticks outside the limits of their axis: they are made, and not drawn."""
    found: set[Text] = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        found |= {
            t for tick in ticks if not low <= tick.get_loc() <= high for t in (tick.label1, tick.label2)
        }
    return found


def test_the_gap_of_an_only_average_is_shown_also_where_its_curve_is_off_the_axis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Live falls from 4 to 2, an average that hardly moved from 4.1 to 4: a gap of -2 at the end."""
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step, live, average in ((10, 4.0, 4.1), (200, 2.1, 4.05), (300, 2.0, 4.0)):
            gap = {"eval/gap/0.999/loss": live - average, "eval/gap/0.999/loss_se": 0.01}
            record = {"train/step": step, "eval/live/loss": live, "eval/ema/0.999/loss": average}
            file.write(json.dumps(record | gap) + "\n")
    curves, gaps = drawn(monkeypatch, lambda: write_report(tmp_path))[0].axes
    assert curves.get_ylim()[1] < 4.0, "the average is off this axis"
    assert gaps.get_ylim()[0] <= -2.0


def test_a_second_metric_gets_its_own_table_and_a_small_picture(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"train/step": 10, "eval/live/loss": 2.0, "eval/live/accuracy": 0.5}\n'
    )
    paths = write_report(tmp_path)
    assert (tmp_path / "report" / "other_metrics.png").exists()
    assert "accuracy at step 10" in paths.markdown.read_text()


def test_axes_leave_out_what_would_flatten_the_comparison() -> None:
    def curve(*points: tuple[int, float]) -> Series:
        return Series(np.array([step for step, _ in points]), np.array([value for _, value in points]))

    curves = {"live": curve((1, 10.0), (50, 2.5), (100, 2.0)), "a": curve((100, 1.9))}
    low, high = focus(curves, False) or (0, 0)
    assert low < 1.9 and 2.5 < high < 3
    assert focus({"live": curve((1, 2.2), (50, 2.1), (100, 2.0))}, False) is None
    flipped = {name: Series(steps, -values) for name, (steps, values) in curves.items()}
    assert focus(flipped, True) == (-high, -low)


def test_ten_averages_differ_in_colour_marker_or_dashes() -> None:
    names = [str(n) for n in range(10)]
    looks = {tuple(str(line_style(name, names)[key]) for key in ("marker", "linestyle")) for name in names}
    assert len(looks) == 10


def test_a_grid_shows_every_sample_at_the_same_place_of_each_panel(tmp_path: Path) -> None:
    # Sample i is a flat grey of i / 8 in live and of 1 - i / 8 in the average: each must show up, and no other grey.
    greys = np.arange(8) / 8
    live = np.broadcast_to(greys[:, None, None, None], (8, 1, 8, 8))
    write_grid(tmp_path / "grid.png", live, {"0.9": 1 - live})
    with Image.open(tmp_path / "grid.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    left, right = np.split(pixels[:, : pixels.shape[1] // 2 * 2], 2, axis=1)
    for grey in greys:
        for half, expected in ((left, grey), (right, 1 - grey)):
            assert (half == round(expected * 255)).all(axis=-1).sum() >= 32 * 32


def test_a_grid_refuses_shapes_that_are_no_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(4, 8, 8\), expected \[n, 1 or 3, h, w\]"):
        write_grid(tmp_path / "grid.png", np.zeros((4, 8, 8)), {})
    with pytest.raises(ValueError, match=r"0\.9 has shape \(2, 1, 8, 8\), live has \(4, 1, 8, 8\)"):
        write_grid(tmp_path / "grid.png", np.zeros((4, 1, 8, 8)), {"0.9": np.zeros((2, 1, 8, 8))})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("slope", "text"),
    [
        (
            2.04,
            "slope 2.0 (of log ‖EMA - live‖² over log horizon, step 400): the weights drift; a longer average lags.",
        ),
        (
            1.1,
            "slope 1.1 (of log ‖EMA - live‖² over log horizon, step 400): the weights diffuse; a longer average lags",
        ),
        (
            -0.1,
            "slope -0.1 (of log ‖EMA - live‖² over log horizon, step 400): the weights are stationary; a longer",
        ),
    ],
)
def test_the_slope_over_decays_is_told_in_words(tmp_path: Path, slope: float, text: str) -> None:
    make_run(tmp_path)
    assert "log horizon" not in to_markdown(table_of(read_run(tmp_path), "loss"))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"train/step": 400, "ema/slope": slope}) + "\n")
        file.write(json.dumps({"train/step": 500, "ema/slope": None}) + "\n")
    run = read_run(tmp_path)
    assert text in to_markdown(table_of(run, "loss"))
    assert run.averages == list(AVERAGES)
    assert not table_of(run, "accuracy").notes
