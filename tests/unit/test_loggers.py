"""Sinks of metrics. What wandb and TensorBoard hold is read back from the files they wrote, not from a mock."""

import errno
import hashlib
import json
import math
import os
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.makers import start_loggers
from tests.wandb_file import keyed, wandb_records
from trainer.config.schema import LoggerConfig
from trainer.errors import ConfigError, NotSaved
from trainer.loggers import JsonlLogger, Loggers, make_loggers
from trainer.rundir.records import truncate_after


def read_lines(path: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_each_record_is_one_flushed_line_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    logger.log(10, {"train/loss": 1.5, "train/grad_norm": math.nan, "mem/peak_gib": math.inf})
    logger.log(20, {"train/loss": 1.25})
    # Not closed: a killed process would leave just this.
    assert read_lines(path) == [
        {"train/step": 10, "train/loss": 1.5, "train/grad_norm": None, "mem/peak_gib": None},
        {"train/step": 20, "train/loss": 1.25},
    ]


def test_floats_survive_the_file_bit_for_bit(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.log(1, {"a": 0.1 + 0.2, "b": 1e-310})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"train/step": 1, "a": 0.1 + 0.2, "b": 1e-310}]


def test_resuming_drops_later_records_and_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    for step in (10, 20, 30):
        logger.log(step, {"train/loss": step / 7})
    kept = b"".join(path.read_bytes().splitlines(keepends=True)[:2])
    with path.open("a") as file:
        file.write('{"train/step": 40, "train/lo')
    truncate_after(path, 20)
    assert path.read_bytes() == kept
    assert [child.name for child in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_line_of_a_kept_step_does_not_run_into_the_next_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"train/step": 10}\n{"train/step": 1')
    logger = start_loggers(tmp_path, "none", resumed_at=50)
    logger.log(60, {})
    assert [record["train/step"] for record in read_lines(path)] == [10, 60]


def test_a_damaged_line_before_a_kept_record_is_refused_by_number_and_a_later_one_is_cut(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"train/step": 10}\nrubbish\n{"train/step": 30}\n')
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2: expected"):
        truncate_after(path, 30)
    assert path.read_bytes() == before
    truncate_after(path, 20)
    assert path.read_text() == '{"train/step": 10}\n'


def test_without_a_file_there_is_nothing_to_drop(tmp_path: Path) -> None:
    truncate_after(tmp_path / "metrics.jsonl", 5)
    assert list(tmp_path.iterdir()) == []


def test_an_offline_wandb_run_holds_axis_id_config_history_and_summary(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "20260101-000000_quickstart_abc123"
    loggers = start_loggers(run_dir, "wandb", project="here", group="sweep", tags=["a", "b"])
    Image.new("RGB", (4, 4)).save(run_dir / "grid.png")
    loggers.log(10, {"train/loss": 1.5, "eval/live/loss": 2.25})
    loggers.image(10, "samples", str(run_dir / "grid.png"))
    loggers.table(10, "report/loss", ["weights", "loss"], [["live", 1.5], ["0.999", None]])
    loggers.log(20, {"train/loss": 1.25})
    loggers.close({"best/ema/loss": 1.125, "best/ema/name": "0.999"}, 0)

    [file] = run_dir.glob("wandb/offline-run-*-abc123/*.wandb")
    records = wandb_records(file)
    run = next(record.run for record in records if record.HasField("run"))
    assert (run.run_id, run.project, run.run_group, run.display_name) == (
        "abc123",
        "here",
        "sweep",
        run_dir.name,
    )
    assert list(run.tags) == ["a", "b"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update if item.key}
    assert (config["ema"], config["seed"]) == ({"decay": 0.999}, 1)
    assert not run.git.remote_url
    axes = {m.name or m.glob_name: m.step_metric for record in records if (m := record.metric).ByteSize()}
    assert axes["*"] == "train/step"
    history = [keyed(record.history.item) for record in records if record.HasField("history")]
    assert [row["train/step"] for row in history] == [10, 10, 10, 20]
    assert (history[0]["train/loss"], history[0]["eval/live/loss"], history[3]["train/loss"]) == (
        1.5,
        2.25,
        1.25,
    )
    assert any(key.startswith("samples") for key in history[1])
    [table] = run_dir.glob("wandb/offline-run-*/files/media/table/report/loss_*.table.json")
    shown = json.loads(table.read_text())
    assert (shown["columns"], shown["data"]) == (["weights", "loss"], [["live", 1.5], ["0.999", None]])
    summary: dict[str, Any] = {}
    for record in records:
        summary |= keyed(record.summary.update)
    assert (summary["best/ema/loss"], summary["best/ema/name"]) == (1.125, "0.999")
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]
    assert not list(run_dir.glob("wandb/**/*.py")) and not list(run_dir.glob("wandb/**/diff.patch"))

    assert [record["train/step"] for record in read_lines(run_dir / "metrics.jsonl")] == [10, 20]
    assert loggers.sync_command == f"wandb sync {shlex.quote(str(file.parent))}"
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_tensorboard_files_hold_scalars_image_and_summary(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loggers = start_loggers(tmp_path, "tensorboard")
    Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
    for step in (10, 20, 30):
        loggers.log(step, {"train/loss": step / 4})
    loggers.image(20, "samples", str(tmp_path / "grid.png"))
    loggers.table(30, "report/loss", ["weights", "loss"], [["live", 1.5], ["0.999", None]])
    loggers.close({"best/ema/loss": 9.5}, 0)
    resumed = start_loggers(tmp_path, "tensorboard", resumed_at=20)
    resumed.log(30, {"train/loss": 99.0})
    resumed.close({"best/ema/loss": 2.5, "best/ema/name": "0.999"}, 0)

    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 2.5), (20, 5.0), (30, 99.0)]
    assert [e.step for e in events.Images("samples")] == [20]
    table = events.Tensors("report/loss/text_summary")[0].tensor_proto.string_val[0].decode()
    assert table == "| weights | loss |\n| --- | --- |\n| live | 1.5 |\n| 0.999 |  |"
    assert [(e.step, e.value) for e in events.Scalars("best/ema/loss")] == [(30, 2.5)]
    assert "0.999" in events.Tensors("summary/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "decay" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert loggers.sync_command is None


def test_without_tensorboard_the_message_names_the_key_and_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"logger=tensorboard.*\.\[tensorboard\]"):
        start_loggers(tmp_path, "tensorboard")


def test_an_unknown_logger_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"logger\.name=mlflow: expected wandb, tensorboard, csv, trackio or none"
    ):
        start_loggers(tmp_path, "mlflow")
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_no_logger_gets_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = LoggerConfig(name="none", args={"key": "lr"})
    with pytest.raises(ConfigError, match=r"^logger\.args\.key: logger\.name=none has no arguments$"):
        make_loggers(config, run_dir=tmp_path, run_id="x", run_config={}, resumed_at=None)
    assert list(tmp_path.iterdir()) == []


class Sink:
    """A logger that fails in the call named, and notes all calls."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.failing:
            raise OSError(f"disk full\nin {name}")

    def log(self, step: int, metrics: Any) -> None:
        self._call("log")

    def image(self, step: int, name: str, path: str) -> None:
        self._call("image")

    def table(self, step: int, name: str, headers: object, rows: object) -> None:
        self._call("table")

    def close(self, summary: Any, exit_code: int) -> None:
        self._call("close")


@pytest.mark.parametrize("failing", ["log", "image", "table", "close"])
def test_a_logger_that_fails_is_off_with_one_warning_and_the_others_go_on(
    failing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = Sink(failing), Sink()
    loggers = Loggers([first, second])
    for step in (1, 2):
        loggers.log(step, {})
        loggers.image(step, "a", "a.png")
        loggers.table(step, "a", [], [])
    loggers.close({}, 1)
    assert second.calls == ["log", "image", "table"] * 2 + ["close"]
    assert first.calls.count(failing) == 1 and first.calls[-1] == "close"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: logger: Sink failed") and f"(OSError: disk full in {failing})" in line


def test_a_wandb_service_that_dies_is_one_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loggers = start_loggers(tmp_path / "run", "wandb")
    loggers.log(1, {"train/loss": 1.5})
    services = [pid for pid in children() if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert services
    for pid in services:
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not (printed := capfd.readouterr().err):  # the first records go into the socket of the dead one
        loggers.log(2, {"train/loss": 1.25})
        assert time.monotonic() < deadline
    loggers.log(3, {"train/loss": 1.0})
    loggers.close({}, 0)
    assert printed.startswith("warning: logger: WandbLogger failed") and printed.count("\n") == 1
    assert capfd.readouterr().err == ""
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1] == {"train/step": 3, "train/loss": 1.0}
    start_loggers(tmp_path / "later", "wandb").close({}, 0)
    assert capfd.readouterr().err == ""
    __import__("wandb").teardown()  # other tests set variables that wandb reads once


def children() -> list[int]:
    return [
        int(pid) for tasks in Path("/proc/self/task").glob("*/children") for pid in tasks.read_text().split()
    ]


def test_a_disk_that_fills_under_tensorboard_is_one_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gfile = pytest.importorskip("tensorboard.compat.tensorflow_stub.io.gfile")
    loggers = start_loggers(tmp_path, "tensorboard")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gfile.LocalFileSystem, "append", fail)
    deadline = time.monotonic() + 60
    while not (printed := capfd.readouterr().err):  # another thread writes
        loggers.log(2, {"train/loss": 1.25})
        assert time.monotonic() < deadline
    loggers.close({}, 0)
    assert printed.startswith("warning: logger: TensorBoardLogger failed") and "No space left" in printed
    assert printed.count("\n") == 1 and capfd.readouterr().err == ""


def test_records_that_cannot_be_opened_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(
        ConfigError, match=rf"^{tmp_path}/metrics\.jsonl: cannot be written: No space left on"
    ):
        start_loggers(tmp_path, "none")


class Disk:
    """`os.write` on a disk with room for so many bytes."""

    def __init__(self, room: int) -> None:
        self.room, self._write = room, os.write

    def __call__(self, descriptor: int, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._write(descriptor, data[: self.room])
        self.room -= written
        return written


def test_records_that_find_no_room_are_written_later_whole_or_refuse_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    loggers = Loggers([JsonlLogger(path)])
    disk = Disk(room=40)
    monkeypatch.setattr(os, "write", disk)
    loggers.log(1, {"train/loss": 0.5})
    assert not loggers.failed
    loggers.sync()
    for step in (2, 3):  # a part of the second line fits
        loggers.log(step, {"train/loss": 0.5})
    assert loggers.failed
    message = rf"^{path}: cannot be written: No space left on device; [^\n]*$"
    with pytest.raises(NotSaved, match=message):
        loggers.sync()
    disk.room = 1000
    after = loggers.sync()
    assert [record["train/step"] for record in read_lines(path)] == [1, 2, 3]
    assert after[path.name] == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(NotSaved, match=r"could not be written: No space left on device; now it can"):
        loggers.raise_failure()


@pytest.mark.parametrize(
    ("target", "args", "expected"),
    [
        ("trainer.loggers.progress.Progress", {}, "has no method log"),
        ("trainer.loggers.jsonl.JsonlLogger", {"path": "elsewhere.jsonl"}, "logger.args"),
        ("trainer.loggers.tensorboard.TensorBoardLogger", {"run_dir": "elsewhere"}, "logger.args.run_dir"),
        ("shutil.rmtree", {}, "logger._target_: 'shutil.rmtree' is not under"),
    ],
)
def test_frozen_logger_target_cannot_choose_its_files(
    tmp_path: Path, target: str, args: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        make_loggers(
            LoggerConfig(_target_=target, args=args),
            run_dir=tmp_path,
            run_id="a",
            run_config={},
            resumed_at=None,
        )
    assert not Path("elsewhere.jsonl").exists()


def test_what_wandb_finds_in_the_environment_is_refused_in_one_line_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_TAGS", "x" * 400)
    with pytest.raises(ConfigError, match=r"^logger: .*: run_tags: .*between 1 and 64") as refused:
        start_loggers(tmp_path / "run", "wandb")
    assert "\n" not in str(refused.value)
