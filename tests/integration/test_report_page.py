"""The pages of a run and of a comparison in a real browser, opened from disk.

The names in them come from runs, and try to be markup and script. Orders are those of the numbers in the test.
"""

import json
from collections.abc import Iterator
from pathlib import Path

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
    assert tab.evaluate("document.querySelectorAll('img').length") >= 4
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
      const boxes = [...document.querySelectorAll('h1, h2, p, .scroll, figure, details')]
        .filter(node => !node.parentElement.closest('details')).map(node => node.getBoundingClientRect());
      return boxes.slice(1).filter((box, n) => box.top < boxes[n].bottom - 1).length;
    })()"""
    assert tab.evaluate(overlaps) == 0


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
