"""`weights=best` and the directory of a sweep: the run and the weights that the verdict names."""

import json
from pathlib import Path

import pytest

from launch import compare, export
from launch.winner import settled
from tests.makers import refusal_of
from tests.many_runs import make_run, sweep

DIRECTED = json.dumps({"higher_is_better": []})


def test_a_run_and_names_are_as_they_are(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 2.0, 1.5)
    assert settled(run, ["live", "ema/*"]) == (run, ["live", "ema/*"])


def test_best_is_the_winner_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", 2.0, 1.5, meta=DIRECTED)
    (run / "config.yaml").write_text("trainer: {eval_samples: 100}\n")
    assert settled(run, ["live", "best"]) == (run, ["live", "ema/0.9"])
    assert "EMA 0.9 wins by loss" in capsys.readouterr().out
    assert settled(make_run(tmp_path / "worse", 1.0, 1.5, meta=DIRECTED), ["best"])[1] == ["live"]


def test_runs_that_did_not_do_all_their_steps_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the choice of the best weights, and by a comparison of one run or of several, each in one line."""
    runs = [
        make_run(tmp_path / "all" / str(steps), 2.0, 1.5, f"trainer.steps={steps}", meta=DIRECTED)
        for steps in (100, 101, 200)
    ]
    short, long = "101 (evaluated at step 100 of 101)", "200 (evaluated at step 100 of 200)"
    for folder, named in (
        (runs[0], []),
        (runs[1], [f"Unfinished: {short}."]),
        (tmp_path / "all", [f"Unfinished: {short}, {long}."]),
    ):
        settled(folder, ["best"])
        chosen = capsys.readouterr().out.splitlines()
        compare.main([str(folder)])
        for lines in (chosen, capsys.readouterr().out.splitlines()):
            assert [line for line in lines if line.startswith("Unfinished")] == named


def test_of_a_sweep_the_best_run_of_the_best_group_is_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sweep(tmp_path / "sweep")
    make_run(folder / "3", 2.2, 1.4, "optimizer.lr=0.1", "seed=2")
    make_run(folder / "4", 9.0, 8.0, "optimizer.lr=0.3", "seed=0")
    assert settled(folder, ["ema"]) == (folder, ["ema"])  # no sweep without its record
    (folder / "sweep.json").write_text("{}")
    assert settled(folder, ["ema"]) == (folder / "3", ["ema"])
    assert capsys.readouterr().out.startswith(f"chosen: {folder / '3'} (")
    assert settled(folder, ["best"]) == (folder / "3", ["ema/0.9"])
    assert settled(folder, ["best"], "best") == (folder / "3", ["best"])  # the best step decides these


def test_what_cannot_be_ranked_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 2.0, 1.5, meta=json.dumps({"direction_undeclared": ["loss"]}))
    assert "does not declare whether a higher loss is better" in refusal_of(settled, run, ["best"])
    (run / "metrics.jsonl").write_text('{"train/step": 1}\n')
    assert "were not evaluated yet" in refusal_of(settled, run, ["best"])


def test_export_takes_the_best_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", 2.0, 1.5, meta=DIRECTED)
    assert export.main([str(run), "weights=best", f"out={tmp_path / 'm.safetensors'}"]) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith(f"chosen: {run}: ema/0.9 ") and "is no run directory" in printed.err
