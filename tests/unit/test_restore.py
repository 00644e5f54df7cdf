"""What is said when a run cannot be carried on from its checkpoint. Runs of two steps, in this process."""

import shutil
from pathlib import Path

import pytest

from tests.integration.commands import TINY_GPT
from trainer.compose import compose
from trainer.run import run as train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run"
    assert train(*compose([*TINY_GPT, "ema=constant", "trainer.steps=2", f"run_dir={folder}"])) == 0
    return folder


@pytest.fixture
def made(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be altered."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def refused(run_dir: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The one line with which `resume=` is refused; nothing of the directory changes but its lock."""
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train(*compose([f"resume={run_dir}", "trainer.steps=4", *overrides])) == 2
    before.pop(lock := run_dir / "run.lock")
    after = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path != lock}
    assert after == before
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_changed_model_is_refused_by_the_keys_that_were_changed(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(made, capsys, "model.n_layer=3", "model.n_embd=64", "model.rope_base=10000.0")
    assert line.startswith(
        "error: model.n_layer: expected 2, got 3; model.n_embd: expected 32, got 64: the checkpoint does not fit the"
        f" changed model ({made / 'checkpoints' / 'step-00000002'}"
    )
    line = refused(made, capsys, "model.n_layer=1")  # the checkpoint holds more than that model
    assert line.startswith("error: model.n_layer: expected 2, got 1: the checkpoint does not fit")


def test_a_damaged_checkpoint_is_named_with_what_to_do(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = (made / "checkpoints").glob("*/*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert refused(made, capsys) == (
        f"error: resume: {file} is damaged (its checksum is not the marker's);"
        " remove step-00000002 to go on from an older checkpoint"
    )
