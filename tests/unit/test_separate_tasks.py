"""Several tasks of Slurm without torchrun would be as many runs; one task, or torchrun's ranks, are one run."""

import pytest

from tests.makers import refusal_of
from trainer.distributed.torchrun import refuse_separate_tasks

VARIABLES = (
    "RANK",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_NNODES",
    "SLURM_STEP_ID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_NUM_NODES",
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "command"),
    [
        (
            {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0"},
            "srun --nodes=1 --ntasks-per-node=1 torchrun --nproc-per-node=2 -m trainer",
        ),
        (
            {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_NNODES": "2", "SLURM_STEP_ID": "0"},
            "srun --nodes=2 --ntasks-per-node=1 torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d"
            " --rdzv-endpoint=$(hostname):29400 --rdzv-id=$SLURM_JOB_ID -m trainer",
        ),
    ],
)
def test_several_tasks_are_refused_with_the_command_that_joins_them(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], command: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused = refusal_of(refuse_separate_tasks, "train")
    assert refused.startswith("SLURM_NTASKS: ") and refused.endswith(f"use: {command}")
    assert "put env -u SLURM_PROCID before the command" in refused
    monkeypatch.delenv("SLURM_PROCID")
    refuse_separate_tasks("train")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"},
        {"SLURM_NTASKS": "4"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "RANK": "3"},
    ],
    ids=[
        "no Slurm",
        "one task",
        "an interactive allocation",
        "a batch script",
        "a step of one task",
        "ranks of torchrun",
    ],
)
def test_one_task_and_the_ranks_of_torchrun_run(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refuse_separate_tasks("train")
