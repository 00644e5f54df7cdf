"""A run directory may be a stranger's: reading it never waits, never fills the memory, and fails in one line."""

import json
import os
import pickle
import resource
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.run_status import run_lines
from launch.sweeps.attempt import read_attempts
from launch.sweeps.directory import Sweep
from tests.makers import make_run_dir, refusal_of, save_checkpoint
from trainer.checkpoint.continuity import covered_by
from trainer.checkpoint.store import load_checkpoint, stored_progress
from trainer.config.frozen import thaw
from trainer.report.runs import read_run
from trainer.rundir.directory import RunDir
from trainer.rundir.records import newest_records, truncate_after

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{inner}'] * 9)}]\n"
    for inner, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = make_run_dir(tmp_path / "run", "trainer:\n  steps: 4\n")
    run.metrics_path.write_text('{"train/step": 1}\n')
    state = {"w": torch.ones(4), "progress": {"step": 4, "skipped": 0, "averages": []}}
    save_checkpoint(run.checkpoints, 4, state, keep=1)
    (run.path / "sweep.json").write_text("{}")
    (run.path / "attempts.json").write_text("[]")
    return run


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """No reading may take gigabytes: a larger allocation fails."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def checkpoint(run: RunDir) -> Path:
    return run.checkpoints / "step-00000004"


READERS: dict[str, tuple[str, Callable[[RunDir], object]]] = {
    "config": ("config.yaml", lambda run: RunDir.open(run.path)),
    "meta": ("meta.json", lambda run: RunDir.open(run.path)),
    "overrides": ("overrides.yaml", RunDir.check_overrides),
    "report of config": ("config.yaml", lambda run: read_run(run.path).config),
    "report of meta": ("meta.json", lambda run: read_run(run.path)),
    "report of overrides": ("overrides.yaml", lambda run: read_run(run.path).overrides),
    "sweep": ("sweep.json", lambda run: Sweep.open(run.path)),
    "attempts": ("attempts.json", lambda run: read_attempts(run.path)),
    "marker": ("checkpoints/step-00000004/COMMIT.json", lambda run: covered_by(checkpoint(run))),
    "state": ("checkpoints/step-00000004/state.json", lambda run: stored_progress(checkpoint(run))),
    "index": ("checkpoints/step-00000004/.metadata", lambda run: load(checkpoint(run))),
    "shard": ("checkpoints/step-00000004/__0_0.distcp", lambda run: load(checkpoint(run))),
    "metrics": ("metrics.jsonl", lambda run: truncate_after(run.metrics_path, 1)),
    "newest records": ("metrics.jsonl", lambda run: newest_records(run.metrics_path, bool)),
}


def load(path: Path) -> object:
    return load_checkpoint(path, {"w": torch.zeros(4)})


def plant(path: Path, kind: str) -> None:
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(3 << 30)
    else:
        path.write_text("[" * 5_000 if kind == "deep" else "[" * 200 + "]" * 200)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "loop", "large", "deep", "deep and whole"])
def test_what_is_no_small_file_is_refused_in_one_line_that_names_it(
    run: RunDir, reader: str, kind: str
) -> None:
    name, read = READERS[reader]
    if (reader == "newest records" and kind in ("large", "loop")) or (reader == "metrics" and kind == "loop"):
        pytest.skip("reads as a file with one incomplete line, or as a missing file")
    plant(run.path / name, kind)
    if name == "metrics.jsonl" and kind.startswith("deep"):
        (run.path / name).write_text("[" * 100_000 + '\n{"train/step": 1}\n')
    assert Path(name).name in refusal_of(read, run)


@pytest.mark.parametrize(
    "text", [BOMB, "[" * 5_000, "[" * 200 + "]" * 200, "[" + "[]," * 200_000 + "]", "a: b: c"]
)
def test_yaml_that_explodes_when_it_is_used_is_refused(tmp_path: Path, text: str) -> None:
    run = make_run_dir(tmp_path / "run", text)
    for read in (run.latest_config, lambda: run_lines(run.path), lambda: thaw(run.latest_config())):
        assert "config.yaml: expected the configuration as YAML" in refusal_of(read)


def test_a_step_that_no_integer_holds_is_refused(run: RunDir) -> None:
    run.metrics_path.write_text('{"train/step": 1e300}\n{"train/step": 2}\n')
    assert "metrics.jsonl, line 1" in refusal_of(read_run, run.path)


def test_a_large_file_of_records_is_read_in_parts(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.rundir.columns.READ_BYTES", 1_000)
    lines = [json.dumps({"train/step": step, "train/loss": step / 7}) for step in range(1, 500)]
    run.metrics_path.write_text("\n".join(lines) + '\n{"train/st')
    read = read_run(run.path).series("train/loss")
    assert read.pairs() == [(step, step / 7) for step in range(1, 500)]
    run.metrics_path.write_text("\n".join([*lines[:300], "rubbish", *lines[300:]]))
    assert "metrics.jsonl, line 301: expected" in refusal_of(read_run, run.path)


WHOLE = {"step": 4, "skipped": 0, "averages": ["a"]}
"""The progress in a checkpoint of the first release."""


@pytest.mark.parametrize(
    "progress",
    [None, [], "step", {"step": 4}, *(WHOLE | {name: {}} for name in (*WHOLE, "samples", "lr"))],
)
def test_a_progress_of_wrong_types_is_refused(run: RunDir, progress: object) -> None:
    (checkpoint(run) / "state.json").write_text(json.dumps({"progress": progress}))
    assert "state.json has" in refusal_of(stored_progress, checkpoint(run))


@pytest.mark.parametrize(
    "change",
    [
        *({"step": step} for step in (True, -5, 3, 2**70)),
        *({"skipped": skipped} for skipped in (-1, 5, 2**70)),
        *({"samples": samples} for samples in (-1, 2**70)),
        *({"lr": lr} for lr in (float("nan"), float("inf"))),
    ],
)
def test_a_progress_that_no_run_has_is_refused(run: RunDir, change: dict[str, Any]) -> None:
    """A negative number of samples made the training wait for ever."""
    (checkpoint(run) / "state.json").write_text(json.dumps({"progress": WHOLE | change}))
    assert str(checkpoint(run) / "state.json") in refusal_of(stored_progress, checkpoint(run))


def test_a_progress_without_samples_and_learning_rate_is_read(run: RunDir) -> None:
    for more in ({}, {"samples": 9, "lr": 0.5}):
        (checkpoint(run) / "state.json").write_text(json.dumps({"progress": WHOLE | more}))
        assert stored_progress(checkpoint(run)) == (4, 0, ["a"], more.get("samples"), more.get("lr"))


def index_with(run: RunDir, change: Callable[[object], object]) -> None:
    """Change the index, and make the marker agree with it."""
    file = checkpoint(run) / ".metadata"
    content = pickle.dumps(change(pickle.loads(file.read_bytes())))
    file.write_bytes(content)
    marker = json.loads((checkpoint(run) / "COMMIT.json").read_text())
    marker["files"][".metadata"] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    (checkpoint(run) / "COMMIT.json").write_text(json.dumps(marker))


def with_size(size: object) -> Callable[[object], object]:
    def change(index: object) -> object:
        index.state_dict_metadata["w"].size = size  # type: ignore[attr-defined]
        return index

    return change


@pytest.mark.parametrize(
    "change", [lambda _: 7, lambda _: {}, with_size("4"), with_size(torch.Size([10**15]))]
)
def test_an_index_of_wrong_types_or_of_tensors_larger_than_the_files_is_refused(
    run: RunDir, change: Callable[[object], object]
) -> None:
    index_with(run, change)
    assert ".metadata cannot be read" in refusal_of(load, checkpoint(run))
