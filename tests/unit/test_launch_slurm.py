"""What Slurm is asked for. Its answers are made up here; tests/integration/test_slurm.py asks a real one."""

import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from launch.sweeps.backends import slurm
from launch.sweeps.backends.slurm import Slurm, further_options
from launch.sweeps.config import LaunchConfig
from launch.sweeps.directory import Sweep
from launch.sweeps.expand import expand
from tests.sweeps import make_sweep
from trainer.errors import ConfigError

pytest.importorskip("submitit")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every word that Slurm's commands are called with."""
    words: list[str] = []

    def answer(*command: str, advice: str) -> str:
        words.extend(command)
        return ""

    monkeypatch.setattr(slurm, "_slurm_output", answer)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: f"/usr/bin/{name}")
    return words


def test_the_rehearsal_asks_for_what_the_job_will_ask_for(asked: list[str]) -> None:
    options: dict[str, Any] = {"exclusive": True, "overcommit": False, "constraint": "h100", "comment": None}
    Slurm(LaunchConfig(name="slurm", nodes=2, processes_per_node=4, mem_gib=32, sbatch=options)).check("cuda")
    assert {"--nodes=2", "--gpus-per-node=4", "--cpus-per-task=4", "--mem=32G"} <= set(asked)
    assert "--exclusive" in asked and "--constraint=h100" in asked
    assert not [word for word in asked if "overcommit" in word or "comment" in word or "None" in word]
    assert further_options(LaunchConfig(sbatch=options | {"mail_user": "me"})) == {
        "exclusive": True,
        "constraint": "h100",
        "mail-user": "me",
    }
    plan = expand(["launch=slurm", "launch.sbatch.constraint=h100", "launch.sbatch.exclusive=true"])
    assert plan.launch.sbatch == {"constraint": "h100", "exclusive": True}


def test_the_jobs_script_finds_its_folder_and_gives_the_run_its_time_to_save(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a folder; true"
    folder.mkdir()
    monkeypatch.chdir(folder)
    plan = expand(["seed=0"])
    sweep = Sweep.create("sweep", plan.runs, plan.launch)
    launch = LaunchConfig(name="slurm", signal_delay_s=240, setup=["module load cuda"])
    backend = Slurm(launch)
    backend.check("cpu")
    setup = backend._executor(sweep, sweep.jobs[0]).parameters["setup"]
    assert setup[0] == "module load cuda"
    assert f"cd '{folder}'" in setup
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240" in setup


@pytest.fixture
def bin_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one folder on the path."""
    (folder := tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def says(folder: Path, command: str, text: str) -> None:
    """A command of Slurm that fails with this text."""
    (folder / command).write_text(f"#!/bin/sh\necho '{text}' >&2\nexit 1\n")
    (folder / command).chmod(0o755)


def test_without_sbatch_the_message_says_what_was_looked_for_and_the_ways_out(bin_only: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        Slurm(LaunchConfig(name="slurm")).check("cpu")
    assert str(refused.value).startswith("launch: launch=slurm needs sbatch, which is not on the path; ")
    assert "launch=local" in str(refused.value) and "launch=print" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "reached"),
    [
        ("sbatch: fatal: Could not establish a configuration source", False),
        ("allocation failure: Unable to contact slurm controller (connect failure)", False),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", False),
        ("allocation failure: Invalid partition name specified", True),
        ("sbatch: error: Invalid --mem specification", True),
        ('sbatch: unrecognized option --wrong=1\nTry "sbatch --help" for more information', True),
    ],
)
def test_a_cluster_out_of_reach_has_the_ways_out_and_a_refusal_of_one_has_none(
    bin_only: Path, text: str, reached: bool
) -> None:
    says(bin_only, "sbatch", text)
    with pytest.raises(ConfigError) as refused:
        Slurm(LaunchConfig(name="slurm")).check("cpu")
    line = str(refused.value)
    cause = text.partition("\n")[0]
    assert line.startswith(f"launch: sbatch: {cause.removeprefix('sbatch: ')}")
    assert ("launch=local" in line, "no Slurm cluster reached" in line) == (not reached, not reached)


def test_gpus_that_the_nodes_do_not_have_are_named_by_their_key(bin_only: Path) -> None:
    refuses = "echo 'allocation failure: Requested node configuration is not available' >&2; exit 1"
    (bin_only / "sbatch").write_text(f'#!/bin/sh\ncase "$*" in *gpus-per-node*) {refuses};; esac\n')
    (bin_only / "sbatch").chmod(0o755)
    Slurm(LaunchConfig(name="slurm")).check("cpu")
    with pytest.raises(ConfigError) as refused:
        Slurm(LaunchConfig(name="slurm", processes_per_node=4)).check("auto")
    assert str(refused.value).startswith(
        "launch.gpus_per_node: expected a number of GPUs that the nodes have, got 4 (sbatch: allocation failure"
    )
    assert "trainer.device=cpu" in str(refused.value)


def test_a_cluster_that_does_not_answer_is_out_of_reach(
    bin_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(bin_only, "sbatch", "")
    silent = subprocess.TimeoutExpired(["sbatch"], 60)
    monkeypatch.setattr(slurm.subprocess, "run", Mock(side_effect=silent))
    with pytest.raises(ConfigError, match=r"timed out after 60 seconds \(no Slurm cluster reached\); "):
        Slurm(LaunchConfig(name="slurm")).check("cpu")


def test_runs_in_a_queue_out_of_reach_are_not_to_be_run_elsewhere(
    bin_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = make_sweep()
    sweep.jobs[0].handle = "7"
    says(bin_only, "squeue", "squeue: fatal: Could not establish a configuration source")
    with pytest.raises(ConfigError, match=r"^launch: squeue: fatal: .*where the sweep was submitted$"):
        Slurm(LaunchConfig(name="slurm")).held(sweep)
