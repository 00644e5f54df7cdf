"""Exports that are refused or interrupted: one line, and nothing left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import launch.exporting.weights
from launch.export import main
from tests.exports import Renaming, Tied, export, save_run
from tests.forked import FURTHER_IMPORTS
from trainer.rundir.directory import RunDir


def refused(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    run_dir: RunDir,
    *arguments: str,
    trust: str = "tests.",
) -> str:
    """The one line of a refusal, after which nothing new lies beside the run."""
    before = sorted(tmp_path.iterdir())
    assert main([str(run_dir.path), f"allow_targets=[{trust}]", *arguments]) == 2
    assert sorted(tmp_path.iterdir()) == before
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


def test_a_value_that_float16_cannot_hold_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Tied()
    nn.init.constant_(model.norm.bias, 1e5)
    run_dir, _ = save_run(tmp_path, model)
    line = refused(
        capsys, tmp_path, run_dir, "weights=live", f"out={tmp_path / 'm.safetensors'}", "dtype=float16"
    )
    assert line.startswith("error: dtype: norm.bias has the value 1e+05, too large for float16;")


def test_an_average_that_has_not_started_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = save_run(tmp_path, Tied(), start_iter=100)
    line = refused(capsys, tmp_path, run_dir, "weights=ema", f"out={tmp_path / 'm.safetensors'}")
    assert line.startswith("error: weights: ema/0.5 had not started at step 4 (ema.start_iter=100)")


def test_names_paths_and_targets_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = save_run(tmp_path, Tied(), decays=(0.5, 0.9))
    out = f"out={tmp_path / 'm.safetensors'}"
    (tmp_path / "taken").mkdir()
    known = "error: weights: expected one of live, ema/0.5, ema/0.9, got "
    for weights in ("ema", "ema/../../model", "ema/0.5/", "/etc/passwd"):
        assert refused(capsys, tmp_path, run_dir, f"weights={weights}", out) == known + weights
    assert refused(capsys, tmp_path, run_dir, out) == f"{known}nothing"
    line = refused(capsys, tmp_path, run_dir, "weights=live", f"out={tmp_path / 'taken'}")
    assert line == f"error: out: {tmp_path / 'taken'} exists already; files are never overwritten"
    line = refused(capsys, tmp_path, run_dir, "weights=live", "step=3", out)
    assert line.startswith("error: step: ")
    line = refused(capsys, tmp_path, run_dir, "weights=live", out, trust="elsewhere.")
    assert line.startswith("error: model._target_: not allowed by this command line; ")
    assert line.endswith("add 'allow_targets=[elsewhere.,tests.exports.Tied]'")


def test_a_file_of_several_that_exists_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = save_run(tmp_path, Tied())
    (tmp_path / "m-00002-of-00007.safetensors").touch()
    out = f"out={tmp_path / 'm.safetensors'}"
    line = refused(capsys, tmp_path, run_dir, "weights=ema", out, "max_shard_size=1")
    assert line.endswith("m-00002-of-00007.safetensors exists already; files are never overwritten")


def test_a_damaged_checkpoint_is_named_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = save_run(tmp_path, Tied())
    (shard,) = run_dir.checkpoints.glob("step-*/*.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    line = refused(capsys, tmp_path, run_dir, "weights=ema", f"out={tmp_path / 'm.safetensors'}")
    # Neither the key of another command nor its advice: nothing is resumed.
    assert line == f"error: {shard} is damaged (its checksum is not the marker's)"


def test_weights_that_the_run_untied_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Tied()
    model.head.weight = nn.Parameter(torch.zeros(5, 3))
    run_dir, _ = save_run(tmp_path, model)
    line = refused(capsys, tmp_path, run_dir, "weights=live", f"out={tmp_path / 'm.safetensors'}")
    assert line.startswith(
        "error: model: model/embed.weight and model/head.weight are one tensor in the class"
    )


def test_a_configuration_of_another_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = save_run(tmp_path, Tied(width=3), width=4)
    line = refused(capsys, tmp_path, run_dir, "weights=live", f"out={tmp_path / 'm.safetensors'}")
    assert line.endswith("model/embed.weight has shape (5, 3), but Tied has (5, 4)")


def test_an_average_under_other_names_than_the_saved_ones_is_not_replaced_by_live_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = save_run(tmp_path, Renaming())
    line = refused(capsys, tmp_path, run_dir, "weights=ema", f"out={tmp_path / 'm.safetensors'}")
    assert line.endswith(" has ema/0.5/weight, but the model of config.yaml has no such tensor")


def test_ctrl_c_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.exporting.weights, "save_file", interrupted)
    run_dir, _ = save_run(tmp_path, Tied())
    assert export(run_dir, "weights=ema", f"out={tmp_path / 'm.safetensors'}") == 130
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_sigterm_leaves_nothing_also_if_it_comes_again(tmp_path: Path) -> None:
    run_dir, _ = save_run(tmp_path, Tied())
    code = (
        "import os, shutil, signal, sys, launch.exporting.weights\n"
        "remove = shutil.rmtree\n"
        "def interrupted(*args, **more):\n"
        "    os.kill(os.getpid(), signal.SIGTERM); remove(*args, **more)\n"
        "shutil.rmtree = interrupted\n"
        "def stopped(tensors, path, metadata):\n"
        "    path.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGTERM)\n"
        "launch.exporting.weights.save_file = stopped\n"
        f"sys.argv = ['', 'export', {str(run_dir.path)!r}]\n"
        "sys.argv += ['weights=ema', 'out=m.safetensors', 'allow_targets=[tests.]']\n"
        "import launch.console; launch.console.main()\n"
    )
    tree = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": tree, FURTHER_IMPORTS: "torch"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
