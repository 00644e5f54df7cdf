"""`python -m launch.compare`. Means and deviations are those of the numbers in the test, by hand."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.compare import main
from trainer.report.combine import combine, group_names
from trainer.report.read import read_run


def make_run(run_dir: Path, live: float, average: float, *overrides: str, meta: str = "{}") -> Path:
    run_dir.mkdir(parents=True)
    record = {
        "train/step": 100,
        "eval/live/loss": live,
        "eval/ema/0.9/loss": average,
        "eval/gap/0.9/loss": live - average,
        "eval/gap/0.9/loss_se": 0.01,
    }
    (run_dir / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (run_dir / "overrides.yaml").write_text(json.dumps(list(overrides)))
    (run_dir / "meta.json").write_text(meta)
    return run_dir


def sweep(folder: Path) -> Path:
    make_run(folder / "0", 2.0, 1.5, "optimizer.lr=0.1", "seed=0", f"run_dir={folder}/0")
    make_run(folder / "1", 2.2, 1.5, "optimizer.lr=0.1", "seed=1", f"run_dir={folder}/1")
    make_run(folder / "2", 1.9, 1.8, "optimizer.lr=0.2", "seed=0", f"run_dir={folder}/2")
    return folder


def test_seeds_are_averaged_and_what_differs_names_the_groups(tmp_path: Path) -> None:
    runs = [read_run(path) for path in sorted(sweep(tmp_path).iterdir())]
    assert group_names(runs) == ["optimizer.lr=0.1", "optimizer.lr=0.1", "optimizer.lr=0.2"]
    live, average, single_live, single = combine(runs, "loss")
    assert (live.weights, live.runs, average.runs, single.runs) == ("live", 2, 2, 1)
    assert (live.last, live.spread) == (pytest.approx(2.1), pytest.approx(0.02**0.5))
    # Gaps 0.5 and 0.7: mean 0.6, standard deviation sqrt(0.02), standard error sqrt(0.02 / 2) = 0.1.
    assert (average.gap, average.gap_se) == (pytest.approx(0.6), pytest.approx(0.1))
    assert (single.gap, single.gap_se, single.spread) == (pytest.approx(0.1), 0.01, None)
    assert [row.winner for row in (live, average, single_live, single)] == [False, True, False, False]


def test_a_key_that_only_some_runs_set_is_shown_as_the_default_of_the_others(tmp_path: Path) -> None:
    runs = [
        read_run(make_run(tmp_path / "a", 2, 1, "+ema.x=1")),
        read_run(make_run(tmp_path / "b", 2, 1, "seed=3")),
    ]
    assert group_names(runs) == ["ema.x=1", "ema.x=(default)"]


def test_a_sweep_is_printed_run_by_run_and_then_in_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(sweep(tmp_path))]) == 0
    printed = capsys.readouterr().out
    places = [printed.index(title) for title in ("0: loss", "1: loss", "2: loss", "3 runs: loss")]
    assert places == sorted(places)
    assert re.search(r"> optimizer\.lr=0\.1 +EMA 0\.9 +2 +1\.5000", printed.split("3 runs: loss")[1])


def test_one_run_named_twice_is_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path / "a", 2.0, 1.5)
    assert main([str(run_dir), str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("a: loss") == 1 and "runs:" not in printed


def test_runs_without_an_evaluation_are_listed_and_do_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(tmp_path)
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "metrics.jsonl").write_text('{"train/step": 10, "train/loss": 2.0}\n')
    assert main([str(tmp_path)]) == 0
    assert "No evaluation to compare yet." in capsys.readouterr().out


def test_out_gets_page_tables_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([str(sweep(tmp_path / "sweep")), f"out={out}"]) == 0
    assert f"written: {out / 'index.html'}" in capsys.readouterr().out
    curves = {f"curves_{number}.png" for number in range(3)}
    files = {"index.html", "table.md", "table.csv", "runs.csv", "comparison.png"}
    assert {path.name for path in out.iterdir()} == files | curves
    with (out / "table.csv").open() as file:
        assert [row["runs"] for row in csv.DictReader(file)] == ["2", "2", "1", "1"]
    with (out / "runs.csv").open() as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["0", "0", "1", "1", "2", "2"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere"], "nowhere: no such run or sweep directory"),
        ([".", "out=x"], "expected a run directory, or a directory of runs"),
        (["out=x"], "expected at least one run or sweep directory"),
        ([".", "out="], "out=: expected one directory"),
        ([".", "out=file"], "out=file: expected a directory, this is a file"),
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
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and expected in printed.err
    assert not (tmp_path / "x").exists()


def test_no_argument_is_bad_input_and_help_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.count("\n  python -m launch.compare") == 2


def test_torch_and_matplotlib_are_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from launch.compare import main; code = main(sys.argv[1:]); "
        "sys.exit(code or str({'torch', 'matplotlib', 'wandb'} & set(sys.modules)).replace('set()', '') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(sweep(tmp_path))], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
