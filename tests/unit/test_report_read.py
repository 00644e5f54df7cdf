"""Reading a run directory back, whole or damaged. Expected values are what the test itself wrote."""

import json
import math
from pathlib import Path

import pytest

from trainer.config import ConfigError
from trainer.loggers import JsonlLogger
from trainer.report.read import find_runs, read_run


def write(run_dir: Path, *records: dict[str, float | None]) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (run_dir / "metrics.jsonl").write_text(text)
    return run_dir


def test_what_the_logger_wrote_is_read_back(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.log(10, {"train/loss": 1.5, "eval/live/loss": math.nan, "ema/power_16.97/rel_l2": 0.1})
    logger.log(20, {"train/loss": 1.25, "eval/live/loss": 2.0, "eval/ema/warmup_0.999/loss": 1.75})
    run = read_run(tmp_path)
    assert run.series("train/loss") == [(10, 1.5), (20, 1.25)]
    (first, lost), last = run.evaluation("live", "loss")
    assert (first, last) == (10, (20, 2.0)) and math.isnan(lost)
    assert run.averages == ["power_16.97", "warmup_0.999"]
    assert run.evaluation("warmup_0.999", "loss") == [(20, 1.75)]


def test_a_block_of_a_model_is_no_average(tmp_path: Path) -> None:
    write(tmp_path, {"train/step": 1, "ema/0.9/rel_l2": 0.1, "ema/0.9/block/h.0/rel_l2": 0.2})
    assert read_run(tmp_path).averages == ["0.9"]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, {"train/step": 1, "a": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"train/step": 2, "a"')
    assert read_run(tmp_path).series("a") == [(1, 1.0)]


def test_a_damaged_line_before_the_last_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"train/step": 1}\n[]\n{"train/step": 3}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2: expected a JSON object with train/step"):
        read_run(tmp_path)


def test_the_later_record_of_a_step_wins_and_steps_rise(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"train/step": 2, "a": 1.0, "b": 5.0},
        {"train/step": 1, "a": 0.0},
        {"train/step": 2, "a": 3.0},
    )
    run = read_run(tmp_path)
    assert (run.series("a"), run.series("b")) == ([(1, 0.0), (2, 3.0)], [(2, 5.0)])


def test_meta_json_says_the_primary_metric_and_of_which_metrics_more_is_better(tmp_path: Path) -> None:
    write(tmp_path, {"train/step": 1, "eval/live/loss": 1.0, "eval/live/accuracy": 0.5, "eval/live/f1": 0.4})
    assert read_run(tmp_path).primary_metric == "loss"
    assert [read_run(tmp_path).higher_is_better(metric) for metric in ("loss", "f1")] == [False, None]
    (tmp_path / "meta.json").write_text('{"primary_metric": "accuracy", "higher_is_better": ["accuracy"]}')
    run = read_run(tmp_path)
    assert run.metrics == ["accuracy", "loss", "f1"]
    assert [run.higher_is_better(metric) for metric in run.metrics] == [True, False, False]


def test_config_and_overrides_are_read_from_yaml(tmp_path: Path) -> None:
    write(tmp_path, {"train/step": 1})
    (tmp_path / "config.yaml").write_text("ema:\n  decay: 0.999\n")
    (tmp_path / "overrides.yaml").write_text("- ema.decay=0.999\n- seed=1\n")
    run = read_run(tmp_path)
    assert (run.config, run.overrides) == ({"ema": {"decay": 0.999}}, ["ema.decay=0.999", "seed=1"])


@pytest.mark.parametrize(("name", "text"), [("meta.json", "{"), ("overrides.yaml", "[")])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    write(tmp_path, {"train/step": 1})
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=f"{name}: expected") as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value)


def test_runs_are_found_beneath_a_folder_and_not_inside_a_run(tmp_path: Path) -> None:
    first, second = write(tmp_path / "b" / "0"), write(tmp_path / "a" / "deep" / "1")
    write(first / "checkpoints" / "copy")
    assert find_runs(tmp_path) == [second, first]
    assert find_runs(first) == [first]


@pytest.mark.parametrize(
    ("name", "expected"), [("nowhere", "no such run"), ("empty", "expected a run directory")]
)
def test_a_path_without_runs_is_refused(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=f"{name}: {expected}"):
        find_runs(tmp_path / name)
