"""Runs that were evaluated on different samples are not ranked with each other."""

import json
from pathlib import Path

import pytest

from launch.compare import main
from tests.many_runs import make_run, read
from trainer.report.comparison import combine_all


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [
        (["trainer.eval_samples=64"], ["trainer.eval_samples=400"], ["64 samples (", "400 samples ("]),
        (["data.eval_fraction=0.1"], ["data.eval_fraction=0.5"], ["data.eval_fraction=0.1"]),
        (["data._target_=my.data", "data.labelled=0.1"], ["data._target_=my.data"], ["data.labelled=0.1"]),
        (["data.eval_path=a", "data.shift=0"], ["data.eval_path=a", "data.shift=1"], ["data.shift=0"]),
        (["data.eval_path=a", "data.path=x"], ["data.eval_path=a", "data.path=y"], []),
        (
            ["data.eval_fields.x=e.npy", "data.fields.x=[a.npy]"],
            ["data.eval_fields.x=e.npy", "data.fields.x=b.npy", "data.eval_fraction=0.5"],
            [],
        ),
        (["data.eval_fields.x=e.npy"], ["data.eval_fields.x=f.npy"], ["data.eval_fields.x=e.npy"]),
        (["data.eval_split=t", "data.split=x"], ["data.eval_split=t", "data.eval_fraction=0.5"], []),
        (["data.eval_path=a", "data.token_bytes=b.npy"], ["data.eval_path=a"], []),
        (["data.path=./a/"], ["data.path=a"], []),
        (["data.paths=[./a,b/]"], ["data.paths=[a,b]"], []),
        (["data.image_size=null", "model.x=1"], ["data.image_size=~"], []),
        (["data.labelled=0.1"], ["data.labelled=1"], []),
        (["trainer.eval_samples=400"], ["trainer.eval_samples=0"], []),  # a split of 400
        (["data.eval_sets.b.path=a"], ["data.eval_sets.b.path=c"], []),  # by the metric of this set only
    ],
)
def test_runs_evaluated_on_other_samples_are_not_ranked(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    first: list[str],
    second: list[str],
    shown: list[str],
) -> None:
    for number, overrides in enumerate((first, second) * 2):
        count = 64 if "trainer.eval_samples=64" in overrides else 400
        seed, meta = f"seed={number // 2}", json.dumps({"num_samples": count})
        make_run(tmp_path / str(number), 2 + number % 2, 1.0 + number, seed, *overrides, meta=meta)
    assert main([str(tmp_path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("Best setting") == (not shown)
    assert printed.count("Not ranked with runs whose evaluation samples differ: here ") == 2 * bool(shown)
    assert all(text in printed for text in shown)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (["data.eval_sets.b.eval_path=c"], 1),
        (["data.eval_sets.b.eval_path=null"], 2),  # a share of data.path, which the primary set does not have
        (["data.eval_sets.b.eval_path=null", "data.eval_sets.b.path=y"], 1),
    ],
)
def test_the_samples_of_a_further_set_follow_from_its_own_keys(
    tmp_path: Path, changes: list[str], parts: int
) -> None:
    for path in ("a", "c"):
        data = ["data.eval_path=b", f"data.path={path}", *changes]
        logs_a_further_set(make_run(tmp_path / path, 2, 1, *data))
    (found,) = combine_all(read(tmp_path))
    assert [one.metric for one in found] == ["loss", *["b/loss"] * parts]


def logs_a_further_set(run: Path) -> None:
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace("{", '{"eval/live/b/loss": 1.0, ', 1))


def test_runs_with_another_further_set_are_ranked_by_the_primary_one_alone(tmp_path: Path) -> None:
    for number, path in enumerate(("a", "c")):
        logs_a_further_set(make_run(tmp_path / path, 2, 1, f"seed={number}", f"data.eval_sets.b.path={path}"))
    (found,) = combine_all(read(tmp_path))
    assert [(one.metric, one.runs) for one in found] == [("loss", 2), ("b/loss", 1), ("b/loss", 1)]
    assert found[0].notes == [] and "here data.eval_sets.b.path=a; there" in found[1].notes[0]
