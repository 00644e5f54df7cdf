"""A wheel of the tree is the whole project: it holds every module and YAML file, and runs outside the tree."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]
PACKAGES = ("conf", "ema", "launch", "models", "trainer")


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Built from a copy: setuptools leaves its build folder beside pyproject.toml.
    source = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(TREE / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TREE / name, source)
    out = tmp_path_factory.mktemp("wheel")
    done = run(
        "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), ".", cwd=source
    )
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("polyak-*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_wheel_holds_every_module_and_yaml_file_and_nothing_else(unpacked: Path) -> None:
    expected = {
        str(path.relative_to(TREE))
        for name in PACKAGES
        for path in (TREE / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and "local" not in path.parts
    }
    found = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert {path for path in found if ".dist-info/" not in path} == expected


def test_wheel_names_its_licence_python_and_dependencies(unpacked: Path) -> None:
    project = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]
    (metadata,) = unpacked.glob("polyak-*.dist-info/METADATA")
    lines = metadata.read_text().splitlines()
    assert f"Version: {project['version']}" in lines
    assert "License-Expression: Apache-2.0" in lines
    assert "Requires-Python: >=3.11" in lines
    required = {
        re.split(r"[<>=;\s]", line.removeprefix("Requires-Dist: "))[0]
        for line in lines
        if "Requires-Dist" in line
    }
    assert {"torch", "hydra-core", "omegaconf", "wandb"} <= required


def test_trainer_answers_outside_the_tree(unpacked: Path, tmp_path: Path) -> None:
    done = run("-m", "trainer", "--help", cwd=tmp_path, PYTHONPATH=str(unpacked))
    assert done.returncode == 0, done.stderr
    assert "experiment" in done.stdout
    where = run("-c", "import trainer; print(trainer.__file__)", cwd=tmp_path, PYTHONPATH=str(unpacked))
    assert where.stdout.startswith(str(unpacked))
    assert list(tmp_path.iterdir()) == []
