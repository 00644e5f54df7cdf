"""A run directory is made whole and once, and opened only as it was made. Expected values are the contract's own."""

import errno
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trainer.errors import ConfigError
from trainer.rundir import directory as rundir
from trainer.rundir import lock as run_lock
from trainer.rundir.directory import RunDir, default_run_dir

CONFIG = "seed: 1\ntrainer:\n  steps: 10\n"


def create(path: Path, **changes: object) -> RunDir:
    arguments = {"config_yaml": CONFIG, "overrides": ["seed=1"], "meta": {"world_size": 2}, **changes}
    return RunDir.create(path, **arguments)


def test_default_name_holds_time_experiment_and_six_hex_digits() -> None:
    name = str(default_run_dir("quickstart"))
    assert re.fullmatch(r"outputs/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_quickstart_[0-9a-f]{6}", name)
    assert default_run_dir("quickstart") != default_run_dir("quickstart")
    assert default_run_dir("../a b").parent == Path("outputs")


def test_created_directory_holds_config_overrides_and_where_it_came_from(tmp_path: Path) -> None:
    run = create(tmp_path / "deep" / "run", overrides=["seed=1", "+x='a: [é\U0001f600'"])
    assert run.config_path.read_text() == CONFIG
    assert yaml.safe_load((run.path / "overrides.yaml").read_text()) == ["seed=1", "+x='a: [é\U0001f600'"]
    meta = json.loads((run.path / "meta.json").read_text())
    assert meta == run.meta
    assert meta["config_sha256"] == hashlib.sha256(CONFIG.encode()).hexdigest()
    assert re.fullmatch(r"[0-9a-z]{8}", meta["wandb_run_id"])
    assert meta["world_size"] == 2
    assert meta["host"] and meta["argv"] and meta["started"].endswith("+00:00")
    assert meta["versions"].keys() == {"python", "torch", "polyak"} and meta["versions"]["torch"]
    assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml", "meta.json", "overrides.yaml"]


def test_no_overrides_is_an_empty_list(tmp_path: Path) -> None:
    assert yaml.safe_load((create(tmp_path / "run", overrides=[]).path / "overrides.yaml").read_text()) == []


def test_git_commit_and_dirty_flag_are_those_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert create(tmp_path / "outside").meta["git"] is None

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        return subprocess.run(
            ["git", *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    Path("code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-qm", "first")
    assert create(tmp_path / "clean").meta["git"] == {
        "commit": git("rev-parse", "HEAD").strip(),
        "dirty": False,
    }
    Path("code.py").write_text("2")
    assert create(tmp_path / "changed").meta["git"]["dirty"] is True


def test_existing_directory_is_refused_and_untouched(tmp_path: Path) -> None:
    run = create(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    with pytest.raises(ConfigError, match=r"^run_dir: .*run exists already; expected"):
        create(tmp_path / "run", config_yaml="seed: 2\n")
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", Path("/")):
        with pytest.raises(ConfigError, match="exists already"):
            create(path)


def test_directory_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^run_dir: .*cannot be made") as caught:
        create(tmp_path / "file" / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("moment", ["config.yaml", "overrides.yaml", "meta.json"])
def test_a_start_that_is_killed_while_it_makes_the_directory_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    write = rundir.write_atomically

    def die_at(path: Path, text: str) -> None:
        if path.name == moment:
            os._exit(9)
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "write_atomically", die_at)
        if (pid := os.fork()) == 0:
            try:
                create(tmp_path / "run")
            finally:
                os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert not (tmp_path / "run").exists()
    assert RunDir.open(create(tmp_path / "run").path).path == tmp_path / "run"


@pytest.mark.parametrize("failing", ["config.yaml", "overrides.yaml", "meta.json"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_in_the_middle_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    write = rundir.write_atomically

    def failing_write(path: Path, text: str) -> None:
        if path.name == failing:
            raise error
        write(path, text)

    monkeypatch.setattr(rundir, "write_atomically", failing_write)
    expected = ConfigError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        create(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_meta_that_is_no_json_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        create(tmp_path / "run", meta={"bad": object()})
    assert not (tmp_path / "run").exists()


def test_opened_directory_is_the_created_one(tmp_path: Path) -> None:
    made = create(tmp_path / "run")
    found = RunDir.open(str(tmp_path / "run"))
    assert found.path == made.path and found.meta == made.meta
    assert found.metrics_path == tmp_path / "run" / "metrics.jsonl"
    assert found.checkpoints == tmp_path / "run" / "checkpoints"
    assert found.report == tmp_path / "run" / "report"


def test_updated_meta_is_on_disk_and_keeps_the_rest(tmp_path: Path) -> None:
    run = create(tmp_path / "run")
    run.update_meta(resumed=["a"])
    run.update_meta(resumed=[*run.meta["resumed"], "b"])
    assert RunDir.open(run.path).meta == run.meta
    assert run.meta["resumed"] == ["a", "b"] and run.meta["world_size"] == 2


def test_interrupted_update_keeps_the_old_meta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create(tmp_path / "run")
    before = (run.path / "meta.json").read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        run.update_meta(resumed=["a"])
    assert (run.path / "meta.json").read_bytes() == before
    assert "resumed" not in run.meta
    assert len(list(run.path.iterdir())) == 3


def test_what_is_no_run_directory_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^resume: .*missing is no directory"):
        RunDir.open(tmp_path / "missing")
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match=r"^RUN_DIR: .*other is no run directory: it has no config.yaml"):
        RunDir.open(tmp_path / "other", key="RUN_DIR")
    (create(tmp_path / "cut").path / "meta.json").unlink()
    with pytest.raises(ConfigError, match=r"it has no meta\.json"):
        RunDir.open(tmp_path / "cut")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"config_sha256": 3}'])
def test_damaged_meta_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (create(tmp_path / "run").path / "meta.json").write_text(text)
    with pytest.raises(ConfigError, match=r"^resume: .*meta\.json") as caught:
        RunDir.open(tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_edited_config_is_refused(tmp_path: Path) -> None:
    create(tmp_path / "run").config_path.write_text(CONFIG.replace("10", "20"))
    with pytest.raises(ConfigError, match=r"^resume: .*config\.yaml was changed after the run started"):
        RunDir.open(tmp_path / "run")


HOLDS = """
import pathlib, signal, sys
from trainer.rundir.directory import RunDir
with RunDir.open(sys.argv[1]).in_use() as has_locks:
    print(has_locks, flush=True)
    signal.pause()
"""


def test_one_process_at_a_time_works_in_a_directory_and_a_killed_one_leaves_it_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create(tmp_path / "run")
    with run.in_use():
        pass
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(run.path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "True\n"
        with pytest.raises(ConfigError, match=rf"resume: .*run is in use by process {holder.pid} on "):
            run.in_use(patience_s=0).__enter__()
        assert capsys.readouterr().err == "", "it did not wait"
        monkeypatch.setattr("trainer.rundir.lock.NOTICE_S", 0.03)
        with pytest.raises(ConfigError):
            run.in_use(patience_s=0.2).__enter__()
        (line,) = capsys.readouterr().err.splitlines()
        assert f"in use by process {holder.pid} on {socket.gethostname()}; waiting up to" in line
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait(60)
        holder.stdout.close()
    with run.in_use(patience_s=0) as has_locks:
        assert has_locks


def test_a_file_system_without_locks_is_told_and_other_errors_are_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create(tmp_path / "run")

    def fails_with(number: int) -> None:
        def lockf(*_: object) -> None:
            raise OSError(number, "")

        monkeypatch.setattr("trainer.rundir.lock.fcntl.lockf", lockf)

    fails_with(errno.ENOLCK)
    with run.in_use() as has_locks:
        assert not has_locks
    fails_with(errno.EIO)
    with pytest.raises(OSError), run.in_use():
        pass


def test_who_opened_the_directory_before_another_session_began_is_refused(tmp_path: Path) -> None:
    early = create(tmp_path / "run")
    late = RunDir.open(early.path)
    late.record_session("seed: 2\n", overrides=["seed=2"])
    with pytest.raises(ConfigError, match="continued by another session meanwhile"), early.in_use():
        pass
    assert len(RunDir.open(early.path).meta["resumed"]) == 1
    with late.in_use():
        pass


def test_a_directory_that_cannot_be_written_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create(tmp_path / "run")

    def read_only(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(run_lock, "open_own", read_only)
    with pytest.raises(ConfigError, match=r"resume: .*run cannot be written: Read-only"), run.in_use():
        pass
