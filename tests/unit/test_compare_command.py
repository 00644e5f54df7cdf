"""`python -m launch.compare`: what it prints and writes."""

import csv
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from launch.compare import main
from launch.comparing.tables import MAX_RUN_TABLES, summary_tables
from tests.benchmarks.bench_compare import make_archive
from tests.many_runs import compared, make_run, read, sweep
from trainer.report.comparison import combine_all
from trainer.report.pictures import plots
from trainer.report.text.comparison_table import combined_table
from trainer.report.text.terminal import print_tables


def test_of_many_groups_the_best_are_printed_and_it_is_said(tmp_path: Path) -> None:
    for number in range(30):
        make_run(
            tmp_path / str(number), 2.0 + abs(number - 20), 1.5 + abs(number - 20), f"optimizer.lr={number}"
        )
    found = compared(read(tmp_path))
    table = combined_table(found, max_lines=6)
    assert [line.cells[0] for line in table.lines[::2]] == ["19", "20", "21"]
    assert table.notes[0] == "The best 3 of 30 groups; table.csv and the page have all."
    assert len(combined_table(found).lines) == 60


def test_hundreds_of_runs_are_not_printed_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(MAX_RUN_TABLES + 1):
        make_run(tmp_path / f"run_{number}", 2.0, 1.5, f"seed={number}")
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "13 runs, 13 seeds: loss" in printed and "run_3" not in printed
    assert "Full report (every run, metric and picture): add out=DIR." in printed


def test_the_benchmarks_archive_is_compared(tmp_path: Path) -> None:
    make_archive(tmp_path / "archive", runs=6, evaluations=3, averages=2)
    assert main([str(tmp_path / "archive"), f"out={tmp_path / 'out'}"]) == 0
    with (tmp_path / "out" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["metric"], row["group"], row["weights"], row["seeds"]) for row in rows] == [
        (metric, f"optimizer.lr={lr}", weights, "3")
        for metric in ("loss", "accuracy")
        for lr in ("0.001", "0.002")
        for weights in ("live", "0.9", "0.9684")
    ]
    assert {row["last_step"] for row in rows} == {"30"}


def test_a_sweep_compared_alone_gets_its_report_and_others_do_not(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "sweep")
    assert main([str(folder)]) == 0
    assert not (folder / "report").exists()
    (folder / "sweep.json").write_text("{}")
    assert main([str(folder), str(folder / "0")]) == 0
    assert not (folder / "report").exists()
    assert main([str(folder)]) == 0
    assert (folder / "report" / "index.html").is_file()


def test_a_sweep_is_printed_as_one_table_and_not_run_by_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(sweep(tmp_path))]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("3 runs: loss\nBest setting by loss (lower is better): not clear")
    assert printed.count(": loss\n") == 1
    # A command is not wrapped.
    assert max(map(len, printed.partition("\nExport ")[0].splitlines())) <= 120
    # The setting in which the groups differ is a column, with one entry per group.
    assert re.search(r"\n0\.1 +live +2 +2\.1000", printed) and re.search(r"\n +EMA 0\.9 +2 +1\.5000", printed)


def test_rows_of_a_picture_are_named_by_what_differs_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two paths that are alike for 60 characters: cut at their ends, both would be called the same."""
    for name in ("firstofthefolders", "secondofthefolders"):
        path = f"/data/a_long_way_down/to/the/folder/of/all/the/texts/{name}/train.bin"
        make_run(tmp_path / name, 2.0, 1.5, f"data.train_path={path}", "optimizer.lr=0.1")
    found = compared(read(tmp_path))
    assert [group.short_name for group in found.groups] == [
        "train_path=…firstofthefolders/…",
        "train_path=…secondofthefolders/…",
    ]
    figures: list[Figure] = []

    def keep(path: Path, draw: Callable[[Figure], None], **_: float) -> None:
        figures.append(Figure())
        draw(figures[-1])

    monkeypatch.setattr(plots, "save", keep)
    plots.draw_comparison(found, tmp_path / "comparison.png", ["0.9"])
    rows = [text.get_text().replace("\n", "") for text in figures[0].axes[0].get_yticklabels()]
    assert rows == [group.short_name for group in found.groups]


def test_one_run_named_twice_is_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path / "a", 2.0, 1.5)
    assert main([str(run_dir), str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("a: loss") == 1 and "runs" not in printed


def test_runs_without_an_evaluation_are_listed_and_do_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(tmp_path)
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "metrics.jsonl").write_text('{"train/step": 10, "train/loss": 2.0}\n')
    assert main([str(tmp_path)]) == 0
    assert "\nNot evaluated by loss: 3.\n" in capsys.readouterr().out
    assert main([str(tmp_path / "3")]) == 0
    assert "No evaluation to compare yet." in capsys.readouterr().out


def test_out_gets_page_tables_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([str(sweep(tmp_path / "sweep")), f"out={out}"]) == 0
    assert f"written: {out / 'index.html'}" in capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert names == {
        "index.html",
        "table.md",
        "table.csv",
        "runs.csv",
        "comparison.png",
        "loss_over_setting.png",
    } | {f"curves_{number}.png" for number in range(2)}
    with (out / "table.csv").open() as file:
        assert [row["seeds"] for row in csv.DictReader(file)] == ["2", "2", "1", "1"]
    with (out / "runs.csv").open() as file:
        by_run = list(csv.DictReader(file))
    assert [row["group"] for row in by_run] == ["0", "0", "1", "1", "2", "2"]
    assert len({(row["seed"], row["optimizer.lr"]) for row in by_run}) == 3
    assert {row["seed"] for row in by_run} == {"0", "1"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere"], "nowhere: no such run or sweep directory"),
        ([".", "out=x"], "expected a run directory, or a directory of runs"),
        (["out=x"], "expected at least one run or sweep directory"),
        ([".", "out="], "out: expected a directory, got nothing"),
        ([".", "out=file"], "out: expected a directory, got file"),
        ([".", "out=x.html"], "out: expected a directory, got x.html; x.html/ makes one of this name"),
        (["run", "out=run"], "out: expected a directory of its own, run is that of a run or a sweep"),
        (["run", "out=sweep"], "out: expected a directory of its own, sweep is that of a run or a sweep"),
        (["run", "out=/proc/x"], "out: /proc/x cannot be written: "),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    if arguments[0] == "run":
        make_run(tmp_path / "run", 2.0, 1.5)
        (tmp_path / "sweep").mkdir()
        (tmp_path / "sweep" / "sweep.json").write_text("{}")
    before = set(tmp_path.rglob("*"))
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and expected in printed.err
    assert set(tmp_path.rglob("*")) == before


def test_no_argument_is_bad_input_and_help_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.count("\n  python -m launch.compare") == 3


def test_torch_and_matplotlib_are_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from launch.compare import main; code = main(sys.argv[1:]); "
        "sys.exit(code or str({'torch', 'matplotlib', 'wandb'} & set(sys.modules)).replace('set()', '') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(sweep(tmp_path))], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_winner_of_all_groups_is_marked_on_the_terminal_and_is_first_on_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for lr, live in (("0.1", 2.0), ("0.2", 3.0)):
        for seed in range(3):
            average = live - 0.5 + 0.01 * seed * (live - 1)  # the groups' difference has a spread, too
            make_run(tmp_path / f"{lr}_{seed}", live, average, f"optimizer.lr={lr}", f"seed={seed}")
    assert main([str(tmp_path), f"out={tmp_path / 'out'}"]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    answer = page[page.index('<section class="answer">') : page.index("<table")]
    assert (
        '<p class="lead">Best setting by loss (lower is better): lr=0.1' in answer
        and "<dt>EMA 0.9 of lr=0.1</dt><dd>1.5100" in answer
    )
    assert "<dt>seeds</dt><dd>3 (6 runs, 2 settings)</dd>" in answer
    assert re.search(r"<pre>.*export .*0\.1_0 weights=ema/0\.9 out=0\.1_0\.safetensors</pre>", answer)
    printed = capsys.readouterr().out
    assert re.search(
        r"\nExport the winner:\n(  source .*\n)?  .*export .*0\.1_0 weights=ema/0\.9 out=", printed
    )
    marked = [line.split() for line in printed.splitlines() if line.startswith("> ")]
    assert [line[:4] for line in marked] == [[">", "EMA", "0.9", "1.5100"]]
    assert re.search(r"\n  0\.1 +live +2\.0000", printed)


def test_a_narrow_terminal_leaves_columns_out_instead_of_breaking_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for lr, live in (("0.000512345", 2.0), ("0.005", 3.0)):
        for seed in range(3):
            average = live - 0.5 + 0.01 * seed * live
            settings = (f"optimizer.lr={lr}", f"model.width={int(100 * live)}", f"seed={seed}")
            make_run(tmp_path / f"{lr}_{seed}", live + seed / 10, average, *settings)
    runs = read(tmp_path)
    shown = {}
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        print_tables(summary_tables(runs, combine_all(runs)), stream := Terminal())
        shown[width] = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).splitlines()
        assert max(map(len, shown[width])) <= width
    wide, narrow = ("\n".join(shown[width]) for width in (120, 80))
    assert "p (Holm)  against live" in wide and "p (Holm)  against live" not in narrow
    assert "Too wide for this terminal, and in the report: p (Holm)" in narrow and "Too wide" not in wide
    assert re.search(r"EMA 0\.9 +1\.5200 ± 0\.02 ", narrow)
