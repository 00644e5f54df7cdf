"""Which errors are a consequence of another rank's end, and which restarted run is one's own.

The messages of gloo and the store are those of torch 2.13, copied from runs in which a rank was killed or put to sleep.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from threading import Thread, current_thread

import pytest
import torch.distributed as dist

from tests.makers import make_run_dir
from trainer.config.schema import Config, TrainerConfig
from trainer.distributed import failures
from trainer.distributed.failures import explain, in_all_processes, lost_others
from trainer.distributed.processes import RaisedOn
from trainer.distributed.roll_call import RollCall
from trainer.distributed.torchrun import Job, own_agent
from trainer.errors import EXIT_BAD_INPUT, EXIT_FAILED, ConfigError, DataFailure, NotSaved
from trainer.rundir.directory import begun_by, default_run_dir

PLACE = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553]"
CLOSED = f"{PLACE} Connection closed by peer [127.0.0.1]:11653. This is typically caused by a remote worker crashing."
TIMED_OUT = f"{PLACE} Timed out waiting 3000ms for recv operation to complete"


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")


def test_a_lost_connection_is_one_line_and_a_consequence(capsys: pytest.CaptureFixture[str]) -> None:
    error = RuntimeError(CLOSED)
    assert lost_others(error)
    assert explain(error, TrainerConfig()) == EXIT_FAILED
    assert capsys.readouterr().err == (
        "rank 1: lost the other ranks while starting (Connection closed by peer [127.0.0.1]:11653);"
        " see the error of the rank that failed first; without one, torchrun was ended\n"
    )


def test_what_comes_of_a_lost_connection_is_a_consequence_too(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        try:
            raise RuntimeError(CLOSED)
        except RuntimeError as error:
            raise ConfigError("resume: the checkpoint cannot be read") from error
    except ConfigError as error:
        assert lost_others(error)
        assert explain(error, TrainerConfig()) == EXIT_FAILED
    assert "lost the other ranks" in capsys.readouterr().err


def test_a_time_out_is_news_and_names_the_limit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    for error in (RuntimeError(TIMED_OUT), dist.DistStoreError("wait timeout after 3000ms, keys: /a")):
        assert not lost_others(error)
        assert explain(error, TrainerConfig(timeout_s=3)) == EXIT_FAILED
        expected = "rank 1: waited 3 s (trainer.timeout_s) for the other ranks while starting"
        assert capsys.readouterr().err == f"error: {expected}\n"
        message = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
        assert message == f"MissingRanks: {expected}"


def test_a_rank_whose_wait_ends_first_leaves_the_cause_to_the_rank_that_has_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = dist.HashStore()
    slow, waiting = (RollCall(store, rank, 2) for rank in range(2))
    for rank in (slow, waiting):
        rank.arrive("training")
    monkeypatch.setattr(failures, "roll_call", lambda: waiting)
    monkeypatch.setattr(failures, "CAUSE_PATIENCE_S", 0.0)
    explain(RuntimeError(TIMED_OUT), TrainerConfig(timeout_s=3))
    assert capsys.readouterr().err == (
        "error: rank 1: waited 3 s (trainer.timeout_s) for the other ranks while training\n"
    )
    monkeypatch.setattr(failures, "CAUSE_PATIENCE_S", 60.0)
    monkeypatch.setattr(failures, "roll_call", lambda: slow if current_thread() is late else waiting)
    late = Thread(target=lambda: explain(DataFailure("data: no batch"), TrainerConfig()))
    late.start()
    assert explain(RuntimeError(TIMED_OUT), TrainerConfig(timeout_s=3)) == EXIT_FAILED
    late.join()
    printed = capsys.readouterr().err
    assert "rank 1: lost the other ranks while training (Timed out waiting 3000ms" in printed
    assert printed.count("error: ") == 1 and "data: no batch" in printed


def test_a_refused_connection_is_no_time_out() -> None:
    refused = f"Gloo connectFullMesh failed with {PLACE} timed out connecting: SO_ERROR: Connection refused"
    assert lost_others(RuntimeError(refused))


def test_a_failure_of_its_own_has_its_traceback_and_an_error_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    try:
        raise RuntimeError("the data is bad")
    except RuntimeError as error:
        assert not lost_others(error)
        assert explain(error, TrainerConfig()) == EXIT_FAILED
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed and "RuntimeError: the data is bad" in printed
    assert "the data is bad" in (tmp_path / "error.json").read_text()


def test_a_failed_save_is_told_by_one_rank_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = NotSaved("run/checkpoints: step 4 cannot be written: No space left on device")
    assert explain(error, TrainerConfig()) == EXIT_FAILED
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert explain(error, TrainerConfig()) == EXIT_FAILED
    assert capsys.readouterr().err == f"error: {error}\n"


def test_an_error_of_another_rank_is_one_line_and_a_consequence(capsys: pytest.CaptureFixture[str]) -> None:
    def on_every_rank(error: Exception) -> Exception:
        error.__cause__ = RaisedOn(0)
        return error

    error = on_every_rank(TypeError("bad state"))
    assert lost_others(error)
    assert explain(error, TrainerConfig()) == EXIT_FAILED
    assert capsys.readouterr().err == "rank 1: ends because rank 0 failed; see its error\n"
    assert not lost_others(on_every_rank(ConfigError("trainer.steps: no")))


def test_a_rank_that_torchrun_ends_leaves_by_pythons_exit_so_that_libraries_remove_their_folders() -> None:
    code = (
        "import os, signal, tempfile\n"
        "from trainer.distributed.failures import awaiting_end\n"
        "folder = tempfile.TemporaryDirectory('like-those-of-wandb')\n"
        "print(folder.name, flush=True)\n"
        "with awaiting_end():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)  # as torchrun does, perhaps while the group is left\n"
    )
    agent = os.environ | {"TORCHELASTIC_RUN_ID": "job"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=agent
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout and not Path(done.stdout.strip()).exists()


@pytest.mark.parametrize(("code", "kept"), [(3, 3), (0, 1), (None, 1)])
def test_an_exit_by_the_user_s_code_is_named_and_never_reads_as_done(
    code: int | None, kept: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(SystemExit) as error:
        in_all_processes(Config(trainer=TrainerConfig(device="cpu")), lambda processes: sys.exit(code))
    assert error.value.code == kept and not dist.is_initialized()
    line = capsys.readouterr().err
    assert line.startswith("error: test_failures.py:") and line.endswith(
        f"ended the process by sys.exit({code})\n"
    )


def test_alone_an_error_is_left_to_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RuntimeError, match="Connection closed"):
        explain(RuntimeError(CLOSED), TrainerConfig())


def test_bad_input_is_raised_before_the_ranks_joined_and_told_after_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ConfigError("trainer.steps: no")
    with pytest.raises(ConfigError):
        explain(error, TrainerConfig())
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    assert explain(error, TrainerConfig()) == EXIT_BAD_INPUT
    assert capsys.readouterr().err == "error: rank 1: trainer.steps: no\n"


def test_the_agent_is_this_process_s_parent_and_has_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert own_agent() is None
    assert Job.of([None, None]) is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    agent = own_agent()
    assert agent is not None and agent.split(":")[-2] == str(os.getppid())
    assert agent == own_agent()


def test_the_token_is_the_job_s_id_where_it_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def token(*agents: str) -> str:
        job = Job.of(agents)
        assert job is not None
        return job.token

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert token("a:1:5", "b:1:6") == token("a:1:5") != token("b:1:6")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job1")
    assert token("a:1:5", "b:1:6") == token("b:1:6", "a:1:5")


def test_a_restart_finds_what_its_own_job_began_and_notes_new_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = Job(("a:1:5", "c:9:9"), "abcdef")
    assert begun_by(None, None) is None
    assert begun_by(job, None) is None
    make_run_dir(Path("outputs/2026-01-01_00-00-00_x_abcdef"), torchrun_agents=["a:1:5", "b:1:6"])
    make_run_dir(
        Path("outputs/2026-01-02_00-00-00_x_abcdef"), torchrun_agents=["a:1:7"]
    )  # the same id, another day
    make_run_dir(Path("outputs/2026-01-03_00-00-00_x_abcdef"))
    Path("outputs/2026-01-04_00-00-00_x_abcdef").mkdir()  # killed while it was made
    found = begun_by(job, None)
    assert found is not None and found.path.name == "2026-01-01_00-00-00_x_abcdef"
    assert found.meta["torchrun_agents"] == ["a:1:5", "b:1:6", "c:9:9"]
    assert default_run_dir("x", job).name.endswith("_x_abcdef")


def test_a_named_directory_is_carried_on_by_the_job_that_made_it_only(tmp_path: Path) -> None:
    make_run_dir(tmp_path / "run", torchrun_agents=["a:1:5"])
    assert begun_by(Job(("a:1:6",), "abcdef"), tmp_path / "run") is None
    own = begun_by(Job(("a:1:5",), "abcdef"), tmp_path / "run")
    assert own is not None and own.path == tmp_path / "run"
    own.config_path.write_text("seed: 2\n")
    with pytest.raises(ConfigError, match=r"^run_dir: .*was changed after the run started"):
        begun_by(Job(("a:1:5",), "abcdef"), tmp_path / "run")
