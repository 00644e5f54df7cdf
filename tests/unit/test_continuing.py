"""Before a run continues, its records are compared with those that its checkpoint covers; a fault changes nothing."""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.sweeps.attempt import attempt
from tests.makers import make_run_dir, refusal_of, save_checkpoint
from trainer.checkpoint.continuity import check_config, check_resumable, covered_by, session_facts
from trainer.distributed.torchrun import is_restart
from trainer.loggers.jsonl import JsonlLogger
from trainer.report import write_report
from trainer.rundir.continuing import Covered, cut_records, set_aside
from trainer.rundir.directory import METRICS, RunDir, sha256_of
from trainer.rundir.pairs import PAIRS

CONFIG = "optimizer:\n  lr: 0.001\n"


def record(step: int) -> bytes:
    return b'{"train/step": %d, "train/loss": 2.5}\n' % step


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run whose second session saved a checkpoint at step 4 and was killed at step 6."""
    run = RunDir.create(tmp_path / "run", config_yaml=CONFIG, overrides=["seed=1"], meta={})
    second = CONFIG.replace("0.001", "0.002")
    run.record_session(second, overrides=["optimizer.lr=0.002"])
    logger = JsonlLogger(run.metrics_path)
    pairs = JsonlLogger(run.path / PAIRS)
    for step in range(1, 5):
        logger.log(step, {"train/loss": 2.5})
        pairs.append(step, {"pairs": {}})
    facts = session_facts(sha256_of(second), {METRICS: logger.sync(), PAIRS: pairs.sync()})
    save_checkpoint(run.checkpoints, 4, {"progress": {"step": 4}}, keep=1, session=facts)
    logger.log(5, {"train/loss": 2.5})
    logger.log(6, {"train/loss": 2.5})
    pairs.append(6, {"pairs": {}})
    return run


def content(run: RunDir) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(run.path.rglob("*")) if path.is_file()}


def edit(run: RunDir, name: str, change: Callable[[bytes], bytes]) -> None:
    path = run.path / name
    path.write_bytes(change(path.read_bytes()))


def resume(run: RunDir, *, restarted: bool = False, accept: bool = False) -> None:
    check_resumable(RunDir.open(run.path), restarted=restarted, accept=accept)


def flip(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(before: bytes) -> bytes:
        assert old in before
        return before.replace(old, new, 1)

    return change


def without(name: str) -> Callable[[bytes], bytes]:
    return lambda before: json.dumps({k: v for k, v in json.loads(before).items() if k != name}).encode()


CHANGES = {
    "empty": (lambda _: b"", "has 0 bytes; expected at least"),
    "shorter": (lambda before: before[: len(record(1)) * 2], "bytes; expected at least"),
    "torn": (lambda before: before[: len(record(1)) * 4 - 3], "bytes; expected at least"),
    "one byte": (flip(b"2.5", b"2.4"), "was changed; its records up to step 4 do not have the SHA-256"),
    "zeros": (lambda before: bytes(len(before)), "do not have the SHA-256"),
    "garbage after": (lambda before: before + b"rubbish\n", "a line that is no later record: b'rubbish"),
    "garbage between later ones": (
        lambda before: before + b"rubbish\n" + record(6),
        "no later record: b'rubbish",
    ),
    "earlier step after": (lambda before: before + record(2), "a line that is no later record"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changed_records_are_refused_in_one_line_and_nothing_changes(run: RunDir, case: str) -> None:
    change, message = CHANGES[case]
    edit(run, "metrics.jsonl", change)
    before = content(run)
    refusal = refusal_of(resume, run)
    assert refusal.startswith(f"resume: {run.metrics_path} ") and message in refusal
    assert "restore it from a copy, or add accept_changed_records=true" in refusal
    assert refusal_of(
        cut_records, run.metrics_path, 4, covered_by(run.checkpoints / "step-00000004")[METRICS]
    )
    assert content(run) == before
    resume(run, accept=True)
    cut_records(run.metrics_path, 4, None)
    assert all(json.loads(line)["train/step"] <= 4 for line in run.metrics_path.read_bytes().splitlines())


@pytest.mark.parametrize(
    "change", [lambda _: b"", flip(b"pairs", b"pairz"), None], ids=["empty", "bit", "removed"]
)
def test_changed_pairs_are_refused_as_changed_records_are(
    run: RunDir, change: Callable[[bytes], bytes] | None
) -> None:
    if change is None:
        (run.path / PAIRS).unlink()
    else:
        edit(run, PAIRS, change)
    before = content(run)
    assert refusal_of(resume, run).startswith(f"resume: {run.path / PAIRS} ")
    assert content(run) == before
    resume(run, accept=True)


def test_while_another_session_works_its_lock_is_named_and_not_its_files(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.checkpoint.continuity.held_by", lambda _: "process 7 on host")
    edit(run, "metrics.jsonl", lambda _: b"")
    resume(run)


@pytest.mark.parametrize("name", ["COMMIT.json", "state.json", ".metadata"])
def test_a_damaged_checkpoint_is_refused_before_anything_is_written(run: RunDir, name: str) -> None:
    edit(run, f"checkpoints/step-00000004/{name}", lambda before: b"x" + before)
    before = content(run)
    refusal = refusal_of(resume, run)
    assert refusal.startswith("resume: ") and name in refusal
    assert content(run) == before


def test_missing_records_are_refused_and_what_is_no_file_too(run: RunDir) -> None:
    run.metrics_path.unlink()
    assert "metrics.jsonl is missing; expected" in refusal_of(resume, run)
    os.mkfifo(run.metrics_path)
    assert "metrics.jsonl: expected a regular file, this is a pipe" in refusal_of(resume, run)


def test_intact_records_are_cut_after_the_checkpoint_with_an_incomplete_line(run: RunDir) -> None:
    edit(run, "metrics.jsonl", lambda before: before + b'{"train/st')
    resume(run)
    cut_records(run.metrics_path, 4, covered_by(run.checkpoints / "step-00000004")[METRICS])
    assert run.metrics_path.read_bytes() == b"".join(map(record, range(1, 5)))


def test_the_logger_goes_on_with_the_digest_of_what_an_earlier_session_wrote(run: RunDir) -> None:
    logger = JsonlLogger(run.metrics_path)
    logger.log(7, {"train/loss": 2.5})
    written = run.metrics_path.read_bytes()
    assert logger.sync() == Covered(len(written), hashlib.sha256(written).hexdigest())


def test_records_are_on_disk_before_the_digest_is_handed_out_and_a_step_syncs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    monkeypatch.setattr("trainer.loggers.jsonl.os.fsync", lambda _: synced.append(path.read_bytes()))
    logger.log(1, {"train/loss": 2.5})
    assert not synced
    logger.sync()
    assert synced[0] == record(1)


def test_a_checkpoint_of_an_earlier_version_covers_nothing_and_resumes(run: RunDir) -> None:
    marker = run.checkpoints / "step-00000004" / "COMMIT.json"
    marker.write_bytes(without("session")(marker.read_bytes()))
    edit(run, "metrics.jsonl", lambda _: b"")
    resume(run)


def test_an_attempt_of_a_sweep_torchrun_and_slurm_restart_a_run_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    for count in counts:
        monkeypatch.delenv(count, raising=False)
    for count in counts:
        monkeypatch.setenv(count, "0")
        assert not is_restart()
        monkeypatch.setenv(count, "1")
        assert is_restart()
        monkeypatch.delenv(count)
        assert not is_restart()
    asks = "import sys; from trainer.distributed.torchrun import is_restart; sys.exit(not is_restart())"
    assert attempt(tmp_path, [sys.executable, "-c", asks]) == 0


def test_records_without_a_checkpoint_are_kept_and_only_a_restart_begins_again(tmp_path: Path) -> None:
    run = make_run_dir(tmp_path / "run")
    run.metrics_path.write_bytes(record(1) + record(2))
    before = content(run)
    refusal = refusal_of(resume, run)
    assert refusal.startswith(f"resume: {run.path} has records and no checkpoint") and "new run" in refusal
    assert content(run) == before
    resume(run, restarted=True)
    first, second = set_aside(run.metrics_path), run.metrics_path
    assert first is not None and first.name == "metrics.jsonl.before-1"
    second.write_bytes(record(1))
    assert set_aside(second) == run.path / "metrics.jsonl.before-2"
    assert first.read_bytes() == record(1) + record(2)


@pytest.mark.parametrize("text", [b"", b'{"train/step": 1, "train/lo'])
def test_records_without_one_whole_record_are_no_reason_to_refuse(tmp_path: Path, text: bytes) -> None:
    run = make_run_dir(tmp_path / "run")
    run.metrics_path.write_bytes(text)
    resume(run)
    assert set_aside(run.metrics_path) is None and not run.metrics_path.exists()


CONFIGURATION = {
    "lr of the second session": ("meta.json", flip(b"lr: 0.002", b"lr: 0.003"), "session 2 was changed"),
    "overrides of the second session": ("meta.json", flip(b"lr=0.002", b"lr=0.003"), "session 2 was changed"),
    "second session gone": ("meta.json", without("resumed"), "meta.json has no configuration with SHA-256"),
    "wandb id gone": ("meta.json", without("wandb_run_id"), "meta.json has no wandb_run_id"),
    "config": ("config.yaml", flip(b"0.001", b"0.002"), "config.yaml was changed after the run started"),
    "overrides": (
        "overrides.yaml",
        flip(b"seed=1", b"seed=2"),
        "overrides.yaml was changed after the run started",
    ),
    "no overrides": ("overrides.yaml", lambda _: b"{", "overrides.yaml"),
}


@pytest.mark.parametrize("case", CONFIGURATION)
def test_a_changed_configuration_is_refused_in_one_line_and_nothing_changes(run: RunDir, case: str) -> None:
    name, change, message = CONFIGURATION[case]
    edit(run, name, change)
    before = content(run)
    refusal = refusal_of(resume, run)
    assert message in refusal and str(run.path / name) in refusal
    assert content(run) == before


def test_an_overrides_file_that_is_gone_is_named_before_the_run_starts(run: RunDir) -> None:
    (run.path / "overrides.yaml").unlink()
    assert "overrides.yaml cannot be read: No such file" in refusal_of(resume, run)


def test_an_evaluation_notices_that_the_configuration_of_a_checkpoint_is_gone(run: RunDir) -> None:
    checkpoint = run.checkpoints / "step-00000004"
    check_config(RunDir.open(run.path), checkpoint)
    edit(run, "meta.json", without("resumed"))
    assert "meta.json has no configuration" in refusal_of(check_config, RunDir.open(run.path), checkpoint)


@pytest.mark.parametrize("name", ["checkpoints", "report", "evaluations", "wandb", "tensorboard"])
def test_a_folder_that_leads_into_another_run_is_refused(run: RunDir, tmp_path: Path, name: str) -> None:
    (tmp_path / "theirs").mkdir()
    if (run.path / name).exists():
        (run.path / name).rename(tmp_path / "mine")
    (run.path / name).symlink_to(tmp_path / "theirs")
    assert f"{run.path / name}: expected a folder of its own, this is a link" in refusal_of(resume, run)


def test_a_checkpoint_that_belongs_to_another_run_is_refused_and_not_pruned(
    run: RunDir, tmp_path: Path
) -> None:
    theirs = (run.checkpoints / "step-00000004").rename(tmp_path / "theirs")
    (run.checkpoints / "step-00000004").symlink_to(theirs)
    assert "step-00000004: expected a folder of its own, this is a link" in refusal_of(resume, run)


def test_a_report_is_not_written_into_another_run(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    run.report.symlink_to(tmp_path / "theirs")
    assert "this is a link" in refusal_of(write_report, run.path)
    assert not list((tmp_path / "theirs").iterdir())
