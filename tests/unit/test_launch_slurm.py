"""What Slurm is asked for. Its answers are made up here; tests/integration/test_slurm.py asks a real one."""

from pathlib import Path
from typing import Any

import pytest

from launch import slurm
from launch.config import LaunchConfig
from launch.expand import expand
from launch.slurm import Slurm, further_options
from launch.sweep import Sweep

pytest.importorskip("submitit")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every word that Slurm's commands are called with."""
    words: list[str] = []

    def answer(*command: str) -> str:
        words.extend(command)
        return ""

    monkeypatch.setattr(slurm, "_asked", answer)
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
