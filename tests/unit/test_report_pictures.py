"""The files of a run's report: its page, and pictures whose labels are all there and beside one another."""

import csv
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from tests import one_run
from tests.one_run import LIVE, make_run
from trainer import report
from trainer.report import write_report
from trainer.report.group import Group
from trainer.report.pictures import decay_plots, plots
from trainer.report.pictures.decay_plots import limits_near_live
from trainer.report.pictures.grid import write_grid
from trainer.report.pictures.plots import focus_limits
from trainer.report.pictures.style import COLOURS, DPI, RC, VARIABLES, WIDTH_IN, group_style, line_style, save
from trainer.report.pictures.svg import add_tips, to_svg
from trainer.report.runs import read_run
from trainer.rundir.columns import Series


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
    images = {"live": np.zeros((4, 1, 8, 8)), "EMA 0.9": np.ones((4, 1, 8, 8))}
    write_grid(run_dir / "report" / "samples.png", images)
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
    assert page.tags.count("svg") == 4 and page.tags.count("img") == 1 and page.tags.count("script") == 1
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
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
    """Margins are estimated from numbers of characters; here the labels are measured, with long numbers and names."""
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
        assert_labels_do_not_overlap(figure)


@pytest.mark.parametrize(("count", "length"), [(64, 4), (20, 16), (12, 40), (3, 120)])
def test_many_averages_and_long_names_are_drawn_in_every_picture(
    count: int, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their legends are higher than the pictures of a few averages."""
    names = [f"0.{10 + place}".ljust(length, "0") for place in range(count)]
    values = {name: ((3.0, 2.0 + place / 100, 2.0), 0.02) for place, name in enumerate(names)}
    monkeypatch.setattr(one_run, "AVERAGES", values)
    run_dir = make_run(tmp_path)
    text = (run_dir / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    for record in lines:
        record |= {key.replace("/loss", "/other"): value for key, value in record.items() if "eval/" in key}
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    figures = drawn(monkeypatch, lambda: write_report(run_dir))
    assert len(figures) == 5
    for figure in figures:
        assert_labels_do_not_overlap(figure)


def test_a_dollar_in_a_name_begins_no_formula(tmp_path: Path) -> None:
    name = r"a$\foo_$"

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot([1, 2], [1, 2], label=name)
        axes.set_xticks([1, 2], [name, "b$"])
        axes.legend()

    assert save(tmp_path / "picture.png", draw, height=3).count(name) == 2


def assert_labels_do_not_overlap(figure: Figure) -> None:
    hidden = beyond(figure)
    boxes = [
        (text.get_text(), text.get_window_extent())
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text() and text not in hidden
    ]
    for text, box in boxes:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert inside, f"{text!r} is cut"
    for index, (text, box) in enumerate(boxes):
        for other, other_box in boxes[:index]:
            shrunk = Bbox.from_extents(box.x0 + 1, box.y0 + 1, box.x1 - 1, box.y1 - 1)
            assert not shrunk.overlaps(other_box), f"{text!r} overlaps {other!r}"
        for axes in figure.axes:
            inner = Bbox.from_extents(axes.bbox.x0 + 4, axes.bbox.y0 + 4, axes.bbox.x1 - 4, axes.bbox.y1 - 4)
            assert not inner.overlaps(box), f"{text!r} overlaps a panel"


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
    low, high = focus_limits(curves, False) or (0, 0)
    assert low < 1.9 and 2.5 < high < 3
    assert focus_limits({"live": curve((1, 2.2), (50, 2.1), (100, 2.0))}, False) is None
    flipped = {name: Series(steps, -values) for name, (steps, values) in curves.items()}
    assert focus_limits(flipped, True) == (-high, -low)


def test_an_average_has_one_colour_in_every_picture_whatever_the_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = drawn(monkeypatch, lambda: write_report(make_run(tmp_path)))
    colours: dict[str, set[str]] = {}
    for line in (line for figure in figures for axes in figure.axes for line in axes.lines):
        name = str(line.get_label()).partition(":")[0]
        if name.startswith("EMA "):
            colours.setdefault(name.split(" (")[0], set()).add(str(line.get_color()))
    assert {name: len(found) for name, found in colours.items()} == dict.fromkeys(
        ("EMA 0.9", "EMA 0.99", "EMA 0.9999"), 1
    )
    # Neither the order nor other averages of the usual banks change it.
    bank = ["0.9", "0.97", "0.99", "0.997", "0.999"]
    assert [line_style(name, bank) for name in bank] == [line_style(name, bank[::-1]) for name in bank]
    assert line_style("0.97", bank) == line_style("0.97", ["0.97"])
    assert not {group_style(index)["color"] for index in range(3)} & set(COLOURS), "groups have greys"


def test_error_bars_of_a_gap_are_on_the_axis_of_the_gaps_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, over_decay, *_ = drawn(monkeypatch, lambda: write_report(make_run(tmp_path)))
    values, gaps = over_decay.axes
    assert (len(values.containers), len(gaps.containers)) == (0, 3)


def test_a_picture_of_many_evaluations_stays_small_and_keeps_the_extremes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(2000):
            record = {"train/step": step, "eval/live/loss": 9.0 if step == 777 else 2 + random.normal(0, 0.1)}
            for name in ("0.9", "0.97", "0.99", "0.997"):
                gap = 1 + random.normal(0, 0.1)
                record |= {f"eval/ema/{name}/loss": record["eval/live/loss"] - gap}
                record |= {f"eval/gap/{name}/loss": gap, f"eval/gap/{name}/loss_se": 0.01}
            file.write(json.dumps(record) + "\n")
    run = read_run(tmp_path)
    svg = plots.draw_curves(Group("mine", [run]), "loss", tmp_path / "curves.png")
    assert svg is not None and len(svg) < 100_000
    figure = Figure()
    plots.plot_line(figure.subplots(), *map(np.asarray, run.evaluation("live", "loss")))
    assert 9.0 in figure.axes[0].lines[0].get_ydata()


def test_the_page_sets_every_colour_of_a_picture_for_light_and_dark_screens() -> None:
    text = (Path(report.__file__).parent / "page.html").read_text()
    for colour, name in VARIABLES.items():
        light, *dark = re.findall(rf"--{name}: (#\w+)", text)
        whole = light if len(light) == 7 else "#" + "".join(2 * digit for digit in light[1:])
        assert (whole, len(dark)) == (colour, 1), name


def test_names_and_values_under_the_pointer_are_escaped(tmp_path: Path) -> None:
    figure = Figure()
    axes = figure.subplots()
    name = '<b>"\'&</title>#1a1a1a id="x" x="1.23456"'
    axes.set_title(name, color="#1a1a1a")
    add_tips(axes, [1.0], [2.0], [name])
    with rc_context(RC):
        root = ElementTree.fromstring(to_svg(figure, "mine", {"#1a1a1a": "ink"}))
    assert [
        node.text for node in root.iter() if node.tag.endswith(("}title", "}text")) and node.text == name
    ] == [
        name,
        name,
    ]


def test_marks_and_signs_of_a_table_are_explained_on_the_page(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, meta={"higher_is_better": ["accuracy"]})
    text = (run_dir / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    for record in lines:
        record |= {
            key.replace("/loss", "/accuracy"): -value for key, value in record.items() if "eval/" in key
        }
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    text = write_report(run_dir).page.read_text()
    assert "(best): " in text and "\u2605: the winner." in text
    assert "above 0 if lower is better, and below 0 if higher is better" in text


def test_ten_averages_differ_in_colour_marker_or_dashes() -> None:
    names = [str(n) for n in range(10)]
    looks = {tuple(str(line_style(name, names)[key]) for key in ("marker", "linestyle")) for name in names}
    assert len(looks) == 10


def test_a_grid_shows_every_sample_at_the_same_place_of_each_panel(tmp_path: Path) -> None:
    # Sample i is a flat grey of i / 8 in live and of 1 - i / 8 in the average: each must show up, and no other grey.
    greys = np.arange(8) / 8
    live = np.broadcast_to(greys[:, None, None, None], (8, 1, 8, 8))
    write_grid(tmp_path / "grid.png", {"live": live, "EMA 0.9": 1 - live})
    with Image.open(tmp_path / "grid.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    left, right = np.split(pixels[:, : pixels.shape[1] // 2 * 2], 2, axis=1)
    for grey in greys:
        for half, expected in ((left, grey), (right, 1 - grey)):
            assert (half == round(expected * 255)).all(axis=-1).sum() >= 32 * 32


def test_a_grid_refuses_shapes_that_are_no_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(4, 8, 8\), expected \[n, 1 or 3, h, w\]"):
        write_grid(tmp_path / "grid.png", {"live": np.zeros((4, 8, 8))})
    with pytest.raises(ValueError, match=r"0\.9 has shape \(2, 1, 8, 8\), live has \(4, 1, 8, 8\)"):
        write_grid(tmp_path / "grid.png", {"live": np.zeros((4, 1, 8, 8)), "0.9": np.zeros((2, 1, 8, 8))})
    assert list(tmp_path.iterdir()) == []


def test_averages_far_worse_than_live_do_not_flatten_the_picture_over_decays() -> None:
    """Best 1.0, live 1.5: four times that distance is shown, and an eighth of it below the best."""
    assert limits_near_live([1.0, 1.2, 9.0], 1.5, False) == (0.75, 3.0)
    assert limits_near_live([-1.0, -1.2, -9.0], -1.5, True) == (-3.0, -0.75)
    assert limits_near_live([1.0, 1.2, 2.9], 1.5, False) is None
    assert limits_near_live([1.0, 1.5, 9.0], math.nan, False) == (0.75, 3.0)
    assert limits_near_live([1.5, 2.0, 9.0], 1.0, False) == (0.5, 5.0)  # live is best of all
    assert limits_near_live([1.0, 1.0], 1.0, False) is None
