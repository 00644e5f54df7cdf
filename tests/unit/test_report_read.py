"""Reading a run directory back, whole or damaged. Expected values are what the test itself wrote."""

import json
import math
from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.loggers import JsonlLogger
from trainer.report.group import Group
from trainer.report.runs import SERIAL_BYTES, find_runs, is_compared, read_run, read_runs
from trainer.rundir.columns import Series


def write(run_dir: Path, *records: dict[str, float | None]) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (run_dir / "metrics.jsonl").write_text(text)
    return run_dir


def pairs(series: Series) -> list[tuple[int, float]]:
    return [(int(step), float(value)) for step, value in zip(*series, strict=True)]


def test_what_the_logger_wrote_is_read_back(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.log(10, {"train/loss": 1.5, "eval/live/loss": math.nan, "ema/power_16.97/rel_l2": 0.1})
    logger.log(20, {"train/loss": 1.25, "eval/live/loss": 2.0, "eval/ema/warmup_0.999/loss": 1.75})
    run = read_run(tmp_path)
    assert pairs(run.series("train/loss")) == [(10, 1.5), (20, 1.25)]
    (first, lost), last = pairs(run.evaluation("live", "loss"))
    assert (first, last) == (10, (20, 2.0)) and math.isnan(lost)
    assert run.averages == ["power_16.97", "warmup_0.999"]
    assert pairs(run.evaluation("warmup_0.999", "loss")) == [(20, 1.75)]


def test_a_block_of_a_model_is_no_average(tmp_path: Path) -> None:
    write(tmp_path, {"train/step": 1, "ema/0.9/rel_l2": 0.1, "ema/0.9/block/h.0/rel_l2": 0.2})
    assert read_run(tmp_path).averages == ["0.9"]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, {"train/step": 1, "a": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"train/step": 2, "a"')
    assert pairs(read_run(tmp_path).series("a")) == [(1, 1.0)]


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
    assert (pairs(run.series("a")), pairs(run.series("b"))) == ([(1, 0.0), (2, 3.0)], [(2, 5.0)])


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
        print(read_run(tmp_path).overrides)
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


def test_lines_of_any_shape_are_read_as_the_json_parser_reads_them(tmp_path: Path) -> None:
    # Two shapes by turns, an order of its own, other spaces, a nested value, text, null, infinity, and more shapes than
    # are read fast. The expected values are those of `json.loads`, line by line.
    lines = [
        '{"train/step": 1, "a": 1.5, "b": -2e-3}',
        '{"train/step": 2, "a": null}',
        '{"train/step": 3, "a": 3, "b": 4.25}',
        '{"a": 5.5, "train/step": 4}',
        '{"train/step":5,"a":6.125}',
        '{"train/step": 6, "a": Infinity, "b": NaN}',
        '{"train/step": 7, "a": "text", "b": [1]}',
        '{"train/step": 8, "a": true}',
        *(f'{{"train/step": {9 + n}, "shape {n}": 0.1, "a": {n}.5}}' for n in range(12)),
        '{"train/step": 30, "a": 0.1234567890123456789, "b": 1e-320}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run = read_run(tmp_path)
    for key in ("a", "b", "shape 3"):
        expected = []
        for record in map(json.loads, lines):
            if key in record:
                number = record[key]
                good = isinstance(number, int | float) and math.isfinite(number)
                expected.append((record["train/step"], float(number) if good else math.nan))
        assert repr(pairs(run.series(key))) == repr(expected)


def test_an_invalid_number_is_reported_with_its_line(tmp_path: Path) -> None:
    # All of the characters of a number, and none.
    text = '{"train/step": 1, "a": 1.5}\n{"train/step": 2, "a": 1.5-2}\n{"train/step": 3, "a": 1.5}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=r"line 2: expected a JSON object"):
        read_run(tmp_path)


def test_many_runs_are_read_by_several_processes_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [
        write(tmp_path / name / "0", {"train/step": 1, "eval/live/loss": n}) for n, name in enumerate("abc")
    ]
    alone = read_runs(paths)
    assert [pairs(run.series("eval/live/loss")) for run in alone] == [[(1, float(n))] for n in range(3)]
    assert SERIAL_BYTES > 0
    monkeypatch.setattr("trainer.report.runs.SERIAL_BYTES", 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    # Three directories are called 0: their names are the parts of the paths that distinguish them.
    assert [run.name for run in read_runs(paths)] == [run.name for run in alone] == ["a/0", "b/0", "c/0"]
    (paths[1] / "metrics.jsonl").write_text("damaged\n{}\n")
    with pytest.raises(ConfigError, match=r"b/0/metrics\.jsonl, line 1"):
        read_runs(paths)


def test_a_comparison_reads_evaluations_and_averages_and_no_blocks(tmp_path: Path) -> None:
    keys = ["eval/live/loss", "ema/0.9/rel_l2", "ema/0.9/decay", "ema/slope"]
    others = ["train/loss", "ema/0.9/block/h.0/rel_l2", "ema/0.9/cosine", "time/step_s"]
    run = read_run(write(tmp_path, {"train/step": 1} | dict.fromkeys([*others, *keys], 0.5)), is_compared)
    assert sorted(run.columns) == sorted(keys)


def test_a_run_that_was_carried_on_has_the_settings_of_its_last_session(tmp_path: Path) -> None:
    write(tmp_path, {"train/step": 1})
    (tmp_path / "overrides.yaml").write_text("- +model.width=64\n- seed=3\n")
    assert read_run(tmp_path).settings == {"model.width": "64", "seed": "3"}
    (tmp_path / "config.yaml").write_text("trainer:\n  steps: 10\n  eval_samples: 8\nema:\n  decays: [0.9]\n")
    run = read_run(tmp_path)
    assert run.settings == {"trainer.steps": "10", "trainer.eval_samples": "8", "ema.decays": "[0.9]"}
    assert (
        run.eval_samples("loss"),
        read_run(write(tmp_path / "x", {"train/step": 1})).eval_samples("loss"),
    ) == (
        8,
        math.inf,
    )
    (tmp_path / "meta.json").write_text(json.dumps({"resumed": [{"config": "trainer:\n  steps: 20\n"}]}))
    assert read_run(tmp_path).settings == {"trainer.steps": "20"}


def test_the_horizon_of_an_average_is_in_steps_however_many_an_update_stands_for(tmp_path: Path) -> None:
    """0.9 a step, in every case: a horizon of 10 steps."""
    logged = {"every": 0.9, "third": 0.9**3, "0.9": 0.9**5}
    write(
        tmp_path,
        {"train/step": 1, **{f"ema/{name}/decay": value for name, value in logged.items()}}
        | {f"ema/{name}/rel_l2": 0.1 for name in logged},
    )
    (tmp_path / "config.yaml").write_text(
        "ema: {update_every: 5, averages: {every: {update_every: 1}, third: {update_every: 3}, '0.9': {}}}"
    )
    horizons = Group("run", [read_run(tmp_path)]).horizons
    assert horizons == pytest.approx(dict.fromkeys(logged, 10.0))


def test_a_setting_of_digits_that_are_no_number_counts_as_none(tmp_path: Path) -> None:
    """`²` is a digit to `str.isdigit`, and none to `int`."""
    write(tmp_path, {"train/step": 1})
    (tmp_path / "config.yaml").write_text("ema:\n  update_every: ²\ntrainer:\n  eval_samples: ²\n")
    run = read_run(tmp_path)
    assert (run.update_every("0.9"), run.eval_samples("loss")) == (1, math.inf)
