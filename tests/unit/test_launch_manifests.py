"""Manifests of runs for Kubernetes and SkyPilot.

A TrainJob is validated by the classes that Kubeflow generates from its own definition. SkyPilot is not installed for
the tests: the part of its schema of a task that a manifest uses is restated here from its documentation. What the
shell of a manifest starts is seen by programs of the names `torchrun` and `polyak` that print their arguments.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import __main__ as launch
from launch import retry
from launch.sweeps.directory import Sweep
from launch.sweeps.expand import expand
from tests.sweeps import make_sweep

BASE = ["experiment=quickstart", "launch=print", "trainer.steps=7"]
TRAINJOB = ["launch.format=trainjob", "launch.image=registry.example/polyak:1"]
SKYPILOT = ["launch.format=skypilot", "launch.gpu_type=H100"]
TWO_NODES = ["sharding=fsdp", "launch.nodes=2", "launch.processes_per_node=4", "trainer.global_batch_size=32"]
RESTATED = {
    "name": str,
    "num_nodes": int,
    "resources": {"accelerators": str, "cpus": str, "memory": str, "image_id": str},
    "envs": dict,
    "setup": str,
    "run": str,
}
"""Fields of a SkyPilot task with their types, restated."""


def documents(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[Any]:
    assert launch.main([*BASE, *arguments]) == 0
    return list(yaml.safe_load_all(capsys.readouterr().out))


def started(script: str, folder: Path, **variables: str) -> list[str]:
    """The words of the program that a script of bash ends in, with their variables filled in."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name in ("torchrun", "polyak"):
        (programs / name).write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@"\n')
        (programs / name).chmod(0o755)
    env = {"PATH": f"{programs}:{os.environ['PATH']}", **variables}
    done = subprocess.run(
        ["bash", "-c", script], env=env, capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.splitlines()


def test_a_train_job_fits_the_classes_of_kubeflow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob  # takes a second

    chosen = [*TRAINJOB, *TWO_NODES, "launch.mem_gib=64", "launch.cpus_per_process=3"]
    found = documents(capsys, "-m", "seed=1,2", f"sweep_dir={tmp_path}/Mine_2/", *chosen)
    assert [document["metadata"]["name"] for document in found] == ["polyak-mine-2-0", "polyak-mine-2-1"]
    for seed, document in enumerate(found, start=1):
        job = TrainerV1alpha1TrainJob.from_dict(document)
        assert job.to_dict() == document  # no field is unknown
        assert job.api_version == "trainer.kubeflow.org/v1alpha1" and job.kind == "TrainJob"
        assert job.spec.runtime_ref.name == "torch-distributed"
        trainer = document["spec"]["trainer"]
        assert (trainer["image"], trainer["numNodes"], trainer["numProcPerNode"]) == (
            "registry.example/polyak:1",
            2,
            4,
        )
        amounts = {"cpu": 12, "memory": "64Gi", "nvidia.com/gpu": 4}
        assert trainer["resourcesPerNode"] == {"requests": amounts, "limits": amounts}
        assert {"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": "90"} in trainer["env"]
        assert trainer["command"] == ["bash", "-c"]
        (script,) = trainer["args"]
        words = started(script, tmp_path)
        assert words[:3] == ["torchrun", "--nnodes=2", "--nproc-per-node=4"]
        assert words[words.index("--no-python") :][:3] == ["--no-python", "polyak", "train"]
        assert f"seed={seed}" in words and f"run_dir={tmp_path}/Mine_2/{seed - 1}_seed_{seed}" in words
        assert not any(word.startswith(("launch", "sweep_dir")) for word in words)


def test_a_job_that_starts_again_continues_its_run_with_the_same_trust(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["trainer.on_checkpoint=cp -r {path} '/a b/'", f"sweep_dir={tmp_path}/s"]
    (document,) = documents(capsys, *TRAINJOB, *own, "trainer.device=cpu")
    (script,) = document["spec"]["trainer"]["args"]
    assert "nvidia.com/gpu" not in document["spec"]["trainer"]["resourcesPerNode"]["limits"]
    (run_dir,) = (word.removeprefix("run_dir=") for word in started(script, tmp_path) if "run_dir=" in word)
    Path(run_dir).mkdir(parents=True)
    (Path(run_dir) / "meta.json").touch()
    again = started(script, tmp_path)
    assert again[:3] == ["polyak", "train", f"resume={run_dir}"]
    (allowed,) = again[3:]
    expected = "on_checkpoint=cp -r {path} '/a b/'"
    (run,) = expand(["trainer.steps=7", allowed]).runs
    assert run.config.allow_targets == [expected]


def test_kubernetes_fills_in_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "trainer.on_checkpoint='echo $$ $$$(TORCH_ELASTIC_SHUTDOWN_TIMEOUT) $(date) {path}'"
    folder = f"{tmp_path}/it\\'s $(PORT)\nand"
    quoted = f"sweep_dir='{folder}'"
    (document,) = documents(capsys, *TRAINJOB, command, quoted, "trainer.device=cpu")
    (script,) = document["spec"]["trainer"]["args"]
    variables = {one["name"]: one["value"] for one in document["spec"]["trainer"]["env"]} | {"PORT": "80"}

    def filled_in(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    done = "\n".join(started(re.sub(r"\$\$|\$\((\w+)\)", filled_in, script), tmp_path))
    assert f"\n{command}\n" in done and f"\nrun_dir='{folder}/0'\n" in done


def test_a_skypilot_task_has_its_fields_and_starts_torchrun_by_its_variables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [f"sweep_dir={tmp_path}/s", "launch.setup=[pip install polyak,nvidia-smi]", "launch.mem_gib=64"]
    (document,) = documents(capsys, *SKYPILOT, *TWO_NODES, *own, "launch.image=a/b:1")
    assert fits(document, RESTATED)
    assert document["resources"] == {
        "accelerators": "H100:4",
        "cpus": "4+",
        "memory": "64+",
        "image_id": "docker:a/b:1",
    }
    assert document["num_nodes"] == 2 and document["setup"] == "pip install polyak\nnvidia-smi\n"
    variables = {
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "4",
    }
    words = started(document["run"], tmp_path, **variables)
    expected = ["torchrun", "--nnodes=2", "--nproc-per-node=4", "--node-rank=1", "--master-addr=10.0.0.1"]
    assert words[:5] == expected and "experiment=quickstart" in words


def fits(value: Any, schema: Any) -> bool:
    if isinstance(schema, dict):
        return set(value) <= set(schema) and all(fits(value[key], schema[key]) for key in value)
    return isinstance(value, schema)


def test_one_process_needs_no_torchrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (document,) = documents(capsys, "launch.format=skypilot", "trainer.device=cpu", f"sweep_dir={tmp_path}/s")
    assert started(document["run"], tmp_path)[:2] == ["polyak", "train"]
    assert "accelerators" not in document["resources"]


@pytest.mark.parametrize("chosen", [TRAINJOB, [*SKYPILOT]])
def test_retry_prints_manifests_that_only_continue(
    chosen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep: Sweep = make_sweep()
    assert retry.main([str(sweep.path), "launch=print", *chosen]) == 0
    printed = capsys.readouterr().out
    found = list(yaml.safe_load_all(printed[printed.index("---\n") :]))
    assert len(found) == len(sweep.jobs)
    for document, job in zip(found, sweep.jobs, strict=True):
        script = document["run"] if "run" in document else document["spec"]["trainer"]["args"][0]
        assert f"resume={sweep.run_dir(job)}" in script and "run_dir=" not in script


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["launch.format=trainjob", "sweep_dir=/a"], "launch.image: expected a container image"),
        ([*TRAINJOB], "sweep_dir: expected an absolute path"),
        ([*TRAINJOB, "sweep_dir=here"], "sweep_dir: expected an absolute path"),
        (["launch.format=skypilot", "sweep_dir=/a"], "launch.gpu_type: expected a name of SkyPilot"),
        (
            ["-m", *SKYPILOT[:1], "sweep_dir=/a", "trainer.device=cpu,cuda"],
            "launch.gpu_type: expected a name",
        ),
        (["launch.format=helm"], "launch.format: expected one of command, trainjob, skypilot, got 'helm'"),
        (["launch=local", "launch.format=trainjob"], "launch.format: read by launch=print only"),
        ([*TRAINJOB, "sweep_dir=/a", "'launch.image=a b'"], "launch.image: expected the name of"),
    ],
)
def test_settings_without_a_manifest_are_refused(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [
        one for one in BASE if not any(own.startswith("launch=") for own in arguments) or "launch" not in one
    ]
    assert launch.main([*base, *(shlex.split(one)[0] for one in arguments)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {expected}"), line
