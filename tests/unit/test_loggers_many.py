"""Several loggers at once, `metrics.csv`, and Trackio.

The package trackio brings a web server and is not installed for the tests. A module of its name with the same three
calls, as its documentation states them, replaces it.
"""

import csv
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from launch.sweeps.expand import expand
from tests.makers import freeze, refusal_of, start_loggers
from trainer.config.compose import compose, to_config
from trainer.config.frozen import thaw
from trainer.config.validate import validate
from trainer.errors import ConfigError


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_csv_file_has_a_row_per_record_and_columns_that_grow(tmp_path: Path) -> None:
    loggers = start_loggers(tmp_path, "csv")
    loggers.log(10, {"train/loss": 0.1 + 0.2, "train/skipped": 1})
    loggers.log(20, {"train/loss": math.nan, 'odd,"name"': 2.0})
    loggers.log(30, {'odd,"name"': -math.inf})
    loggers.close({}, 0)
    assert (tmp_path / "metrics.csv").read_text() == (
        'train/step,train/loss,train/skipped,"odd,""name"""\n'
        "10,0.30000000000000004,1.0,\n20,nan,,2.0\n30,,,nan\n"
    )
    assert float(rows(tmp_path)[0]["train/loss"]) == 0.1 + 0.2


def test_a_resumed_run_has_no_row_twice_and_the_rows_of_sessions_without_the_logger(tmp_path: Path) -> None:
    first = start_loggers(tmp_path, "none")
    first.log(10, {"train/loss": 1.5, "count": 3})
    first.close({}, 75)
    for resumed_at, last in ((10, 30), (20, 20)):
        loggers = start_loggers(tmp_path, "csv", resumed_at=resumed_at)
        for step in range(resumed_at + 10, last + 10, 10):
            loggers.log(step, {"train/loss": step / 7, "count": 3})
        loggers.close({}, 75)
    assert [row["train/step"] for row in rows(tmp_path)] == ["10", "20"]
    assert (
        tmp_path / "metrics.csv"
    ).read_text() == f"train/step,train/loss,count\n10,1.5,3.0\n20,{20 / 7},3.0\n"


def test_a_csv_file_that_cannot_be_written_is_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loggers = start_loggers(tmp_path, "csv")
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / "metrics.csv").mkdir()
    for step in (1, 2):
        loggers.log(step, {"train/loss": 1.0})
    loggers.close({}, 0)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: logger: CsvLogger failed and is off for the rest of this session")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


class Noting:
    """A user's own logger."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "noted"

    def log(self, step: int, metrics: Any) -> None:
        with self.path.open("a") as file:
            file.write(f"{step}\n")

    def image(self, step: int, name: str, path: str) -> None: ...

    def table(self, step: int, name: str, headers: object, rows: object) -> None: ...

    def close(self, summary: Any, exit_code: int) -> None:
        with self.path.open("a") as file:
            file.write(f"closed {exit_code}\n")


OWN = "tests.unit.test_loggers_many.Noting"


def test_each_of_several_loggers_gets_every_record(tmp_path: Path) -> None:
    loggers = start_loggers(tmp_path, "csv", also=["tensorboard", OWN])
    loggers.log(10, {"train/loss": 1.0})
    loggers.close({}, 0)
    assert rows(tmp_path) == [{"train/step": "10", "train/loss": "1.0"}]
    assert list((tmp_path / "tensorboard").iterdir())
    assert (tmp_path / "noted").read_text() == "10\nclosed 0\n"


def test_a_logger_that_does_not_start_ends_those_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match=r"^logger=trackio: .* pip install -e '\.\[trackio\]'"):
        start_loggers(tmp_path, "none", also=[OWN, "trackio"])
    assert (tmp_path / "noted").read_text() == "closed 1\n"


def test_the_list_form_of_the_command_line_chooses_several() -> None:
    for argument, name, also in (
        ("logger=[wandb,csv]", "wandb", ["csv"]),
        ("logger=[csv, tensorboard, wandb]", "csv", ["tensorboard", "wandb"]),
        ("logger=[csv]", "csv", []),
    ):
        cfg, typed = compose([argument])
        config = to_config(cfg)
        assert (config.logger.name, config.logger.also) == (name, also)
        assert not any("[csv," in one for one in typed)  # printed again, it is read by Hydra alone
        validate(config, 1)
        assert to_config(thaw(freeze(cfg))).logger == config.logger
    (run,) = expand(["logger=[wandb,csv]"]).runs
    assert run.config.logger.also == ["csv"]
    assert "also" not in freeze(compose(["logger=csv"])[0])


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("logger=[wandb,csv,csv]", "logger.also: expected each logger once, got 'csv' twice"),
        ("logger=[wandb,none]", "logger.also: expected wandb, tensorboard, csv, trackio or the dotted"),
        ("logger=[csv,mlflow]", "logger.also: expected wandb, tensorboard, csv, trackio or the dotted"),
    ],
)
def test_a_list_that_names_no_loggers_is_refused(argument: str, expected: str) -> None:
    config = to_config(compose([argument])[0])
    assert refusal_of(validate, config, 1).startswith(expected)


def test_wandb_among_several_is_checked_as_wandb() -> None:
    config = to_config(compose(["logger=[csv,wandb]", "logger.project=a/b"])[0])
    assert refusal_of(validate, config, 1).startswith("logger.project: expected")


def test_trackio_gets_the_config_the_records_and_the_numbers_of_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    trackio = ModuleType("trackio")
    trackio.__dict__.update(
        init=lambda **settings: calls.append(settings) or SimpleNamespace(),
        log=lambda metrics, step: calls.append((step, metrics)),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    loggers = start_loggers(tmp_path / "mine", "trackio", project="averages")
    loggers.log(10, {"train/loss": 1.0})
    loggers.close({"best/ema/loss": 0.5, "best/ema/name": "0.99"}, 0)
    config = {"ema": {"decay": 0.999}, "seed": 1}
    begun = {"project": "averages", "name": "mine", "config": config, "resume": "allow"}
    assert calls == [begun, (10, {"train/loss": 1.0}), (10, {"best/ema/loss": 0.5}), "finish"]
    assert json.loads((tmp_path / "mine" / "metrics.jsonl").read_text()) == {
        "train/step": 10,
        "train/loss": 1.0,
    }
