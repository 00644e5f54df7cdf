"""The command line of `launch.export`."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch.export import parse
from launch.exporting.options import Options
from tests.makers import make_run_dir
from trainer.config.frozen import freeze_config
from trainer.config.schema import Config
from trainer.errors import ConfigError
from trainer.rundir.directory import RunDir


def asked(run: RunDir, *arguments: str) -> Options:
    return parse([str(run.path), "out=m.safetensors", *arguments])


def test_steps_are_words_or_numbers(tmp_path: Path) -> None:
    run = make_run_dir(tmp_path / "run", freeze_config(Config()), git=None)
    assert [asked(run, *more).step for more in ([], ["step=best"], ["step=100"])] == ["last", "best", 100]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["dtype=float8"], "dtype: expected one of stored, float32, bfloat16, float16, got float8"),
        (["weight_decay_of=1"], "weight_decay_of: unknown key; expected weights, out,"),
        (["step=1", "step=2"], "step: expected once, got 1 and 2"),
        (["max_shard_size=lots"], "max_shard_size: expected a size"),
        (["elsewhere"], "expected one run directory, got "),
        (["allow_targets=[a"], r"allow_targets: a bracket is not closed"),
        (["step=new"], "step: expected last, best or a number of steps, got 'new'"),
        (["step=-1"], "step: expected last, best or a number of steps, got '-1'"),
    ],
)
def test_the_command_line_is_refused_by_key(tmp_path: Path, arguments: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=f"^{expected}"):
        asked(make_run_dir(tmp_path / "run", freeze_config(Config()), git=None), *arguments)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^RUN_DIR: .* is no run directory"):
        parse([str(tmp_path), "out=m.safetensors"])


def test_help_and_refusals_answer_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from launch.export import main;"
        "codes = [main(['--help']), main([]), main(['nowhere', 'out=a'])];"
        "sys.exit(str(codes) + str({'torch', 'safetensors', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[0, 2, 2]set()"
    assert done.stdout.startswith("Write the weights of a run")
