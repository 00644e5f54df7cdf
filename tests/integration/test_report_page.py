"""The pages of a run and of a comparison in a real browser, opened from disk.

The names in them come from runs, and try to be markup and script. Orders are those of the numbers in the test.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from launch.compare import main
from tests.browser import CHROMIUM, Browser, browser
from trainer.report import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome")

HOSTILE = '<img src="http://example.org/x.png" onerror="console.error(1)"><script>console.error(2)</script>'
WIDTHS = (1280, 390)


def make_run(folder: Path, lr: float, seed: int) -> None:
    run_dir = folder / f"lr_{lr:g}_seed_{seed}"
    run_dir.mkdir(parents=True)
    lines = []
    for step in range(10, 210, 10):
        live = 2 + 1 / step + lr + 0.01 * ((7 * seed + step) % 3)
        record = {"train/step": step, "eval/live/loss": live}
        for name, gap in (("0.9", 0.05), ("0.99", 0.1), ("0.999", -0.3)):
            gap += 0.001 * ((3 * seed + step) % 5)
            record |= {f"eval/ema/{name}/loss": live - gap, f"eval/gap/{name}/loss": gap}
            record |= {f"eval/gap/{name}/loss_se": 0.01, f"ema/{name}/decay": float(name)}
            record |= {f"ema/{name}/rel_l2": gap**2 + 0.1 / step}
        lines.append(json.dumps(record))
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    config = {"seed": seed, "note": HOSTILE, "optimizer": {"lr": lr, "name": f"{HOSTILE}{lr}"}}
    (run_dir / "config.yaml").write_text(json.dumps(config))
    (run_dir / "overrides.yaml").write_text(json.dumps([f"note={HOSTILE}"]))
    (run_dir / "meta.json").write_text(json.dumps({"metric_units": {"loss": "nats"}, "host": HOSTILE}))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for lr in (0.2, 0.1, 10):
        for seed in range(3):
            make_run(folder / "sweep", lr, seed)
    assert main([str(folder / "sweep"), f"out={folder / 'out'}"]) == 0
    run = write_report(folder / "sweep" / "lr_0.1_seed_0")
    return {"comparison": folder / "out" / "index.html", "run": run.page}


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.mark.parametrize("name", ["comparison", "run"])
def test_a_page_asks_nothing_of_the_network_and_complains_of_nothing(
    pages: dict[str, Path], tab: Browser, name: str
) -> None:
    tab.open(pages[name], width=1280)
    assert tab.evaluate("document.querySelectorAll('figure svg').length") >= 4
    assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert tab.evaluate("document.body.textContent.includes('onerror')"), (
        "what came from the run is shown as text"
    )
    assert tab.addresses() == [pages[name].as_uri()]
    assert tab.complaints() == []


def test_the_policy_stops_what_would_ask_the_network(pages: dict[str, Path], tab: Browser) -> None:
    # Also the proof that the two lists above would not be empty.
    tab.open(pages["run"], width=1280)
    tab.evaluate("fetch('http://127.0.0.1:9/x').catch(() => 0); new Image().src = 'http://127.0.0.1:9/y.png'")
    tab.evaluate("console.error('seen')")
    told = json.dumps(tab.complaints())
    assert told.count("Content Security Policy") >= 2 and "seen" in told
    answered = [
        e["params"]["response"]["url"] for e in tab.events if e.get("method") == "Network.responseReceived"
    ]
    assert answered and not [url for url in answered if url.startswith("http")]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["comparison", "run"])
def test_a_page_is_as_wide_as_its_window_and_tables_scroll_by_themselves(
    pages: dict[str, Path], tab: Browser, name: str, width: int
) -> None:
    tab.open(pages[name], width=width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    wide = tab.evaluate(
        "[...document.querySelectorAll('table')].map(t => t.scrollWidth > innerWidth).some(Boolean)"
    )
    assert wide or width == 1280, "a table is wider than a phone"
    overlaps = """(() => {
      const boxes = [...document.querySelectorAll('h1, h2, p, dl, .command, .scroll, figure, details')]
        .filter(node => !node.parentElement.closest('details')).map(node => node.getBoundingClientRect());
      const apart = (a, b) => a.right < b.left + 1 || b.right < a.left + 1
        || a.bottom < b.top + 1 || b.bottom < a.top + 1;
      return boxes.filter((box, n) => boxes.slice(0, n).some(other => !apart(box, other))).length;
    })()"""
    assert tab.evaluate(overlaps) == 0


BOX = (
    "(({{left, right, top, bottom}}) => [left, right, top, bottom])"
    "(document.querySelector('{}').getBoundingClientRect())"
)


@pytest.mark.parametrize("name", ["comparison", "run"])
def test_the_first_screen_answers(pages: dict[str, Path], tab: Browser, name: str) -> None:
    tab.open(pages[name], width=1280)
    verdict, command, figures, picture = (
        tab.evaluate(BOX.format(f".answer {part}")) for part in (".lead", ".command pre", "dl", "svg")
    )
    assert max(box[3] for box in (verdict, command, figures, picture)) <= 800
    assert picture[0] > verdict[1], "two columns"
    text = tab.evaluate("document.querySelector('.answer').innerText")
    assert "EMA 0.99" in text and "seeds" in text and "evaluation samples" in text
    assert re.search(r"export .*weights=ema/0\.99 out=lr_0\.1_seed_\d\.safetensors", text)
    tab.open(pages[name], width=390)
    verdict, picture = (tab.evaluate(BOX.format(f".answer {part}")) for part in (".lead", "svg"))
    assert picture[2] >= verdict[3] and picture[1] <= 390, "one column"


def test_the_command_is_there_without_scripts_and_is_copied_with_them(
    pages: dict[str, Path], tab: Browser
) -> None:
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(pages["run"], width=1280)
        shown = tab.evaluate("document.querySelector('.command').innerText")
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)
    assert "weights=ema/0.99" in shown and "Copy" not in shown
    tab.open(pages["run"], width=1280)
    tab.evaluate(
        "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async text => {window.copied = text}}})"
    )
    tab.evaluate("document.querySelector('.command button').click()")
    assert tab.evaluate("window.copied") == shown.strip()


def test_every_picture_can_be_saved_as_a_file_of_its_own(
    pages: dict[str, Path], tab: Browser, tmp_path: Path
) -> None:
    tab.open(pages["run"], width=1280)
    links = "[...document.querySelectorAll('figure:has(svg) a[download]')].filter(a => a.offsetWidth)"
    assert tab.evaluate(f"{links}.map(a => a.download).sort().join()") == (
        "curves.svg,divergence.svg,heat_map.svg,loss_over_decay.svg"
    )
    tab.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    tab.evaluate(f"{links}[0].click()")
    tab.wait_for("Page.downloadProgress", state="completed")
    picture = ElementTree.parse(tmp_path / "loss_over_decay.svg").getroot()
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    titles = [title.text or "" for title in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert any(re.match(r"live - EMA 0\.99 \+0\.", title) for title in titles), "values under the pointer"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_have_the_colours_of_a_light_and_of_a_dark_page(
    pages: dict[str, Path], tab: Browser, scheme: str
) -> None:
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    try:
        tab.open(pages["run"], width=1280)
        style = "getComputedStyle(document.querySelector('{}')).{}"
        paper, behind, text = (
            tab.evaluate(style.format(*part))
            for part in (
                ("body", "backgroundColor"),
                (".answer svg path", "fill"),
                (".answer svg text", "fill"),
            )
        )
        # An average has one colour in its row and in all pictures; live has that of the text.
        chip = tab.evaluate(style.format("tr.winner .chip", "backgroundColor"))
        used = (
            "[...document.querySelectorAll('{} use')].map(node => getComputedStyle(node).fill).includes('{}')"
        )
        for picture in ("#curves-axes_1", "#divergence-axes_1", "#loss_over_decay-axes_1"):
            assert tab.evaluate(used.format(picture, chip)), picture
    finally:
        tab.call("Emulation.setEmulatedMedia", features=[])
    assert paper == behind
    brightness = [sum(map(int, re.findall(r"\d+", colour))) for colour in (paper, text)]
    assert (brightness[0] < brightness[1]) == (scheme == "dark")


COLUMN = "[...document.querySelector('table').tBodies[0].rows].map(row => row.cells[{}].textContent)"
SORTED = "document.querySelector('table').tHead.rows[0].cells[{}].getAttribute('aria-sort')"


def test_a_click_sorts_by_number_down_and_up(pages: dict[str, Path], tab: Browser) -> None:
    tab.open(pages["comparison"], width=1280)
    heads = tab.evaluate("[...document.querySelectorAll('table')][0].tHead.textContent")
    assert heads.startswith("lrweightsloss (nats) at step 200")
    before = [float(text.split()[0]) for text in tab.evaluate(COLUMN.format(2))]
    assert len(before) == 12 and before != sorted(before)
    click = "document.querySelector('table').tHead.rows[0].cells[2].querySelector('button').click()"
    for direction in ("ascending", "descending"):
        tab.evaluate(click)
        values = [float(text.split()[0]) for text in tab.evaluate(COLUMN.format(2))]
        assert values == sorted(before, reverse=direction == "descending")
        assert tab.evaluate(SORTED.format(2)) == direction
    # Live weights have no gap: last in both directions.
    for _ in range(2):
        tab.evaluate(click.replace("cells[2]", "cells[3]"))
        assert tab.evaluate(COLUMN.format(1))[-3:] == ["live"] * 3
    assert tab.evaluate(SORTED.format(2)) is None


def test_the_keyboard_sorts_as_well(pages: dict[str, Path], tab: Browser) -> None:
    tab.open(pages["run"], width=1280)
    before = tab.evaluate(COLUMN.format(0))
    for _ in range(20):
        tab.press("Tab")
        if tab.evaluate("document.activeElement.textContent") == "weights":
            break
    else:
        pytest.fail("Tab never came to the first head")
    tab.press("Enter")
    assert tab.evaluate(SORTED.format(0)) == "ascending"
    tab.press("Enter")
    assert tab.evaluate(SORTED.format(0)) == "descending"
    assert tab.evaluate(COLUMN.format(0)) != before


@pytest.mark.parametrize("width", WIDTHS)
def test_a_screenshot_can_be_taken(pages: dict[str, Path], tab: Browser, width: int, tmp_path: Path) -> None:
    # For people to look at: pytest keeps the last three folders.
    tab.open(pages["comparison"], width=width)
    tab.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
