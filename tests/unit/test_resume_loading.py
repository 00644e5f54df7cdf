"""What is said when a run cannot be carried on from its checkpoint. Runs of two steps, in this process."""

import errno
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.makers import TINY_GPT
from trainer.checkpoint.format import digest
from trainer.config.compose import compose
from trainer.report.runs import read_run
from trainer.run import run as train
from trainer.rundir.checkpoints import MARKER, SCALARS
from trainer.tasks.language_modeling import LanguageModeling

pytestmark = pytest.mark.slow  # left out of `make quick`


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run"
    assert train(*compose([*TINY_GPT, "ema=constant", "trainer.steps=2", f"run_dir={folder}"])) == 0
    return folder


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time of so small a run would go into the pictures of its report."""
    monkeypatch.setattr("trainer.run.write_result", lambda *_: None)


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
    line = refused(
        made, capsys, "model.n_layer=3", "ema.dtype=bfloat16"
    )  # the model's tensors are looked at first
    assert line.startswith("error: model.n_layer: expected 2, got 3: the checkpoint does not fit")


def test_another_dtype_of_an_average_is_not_blamed_on_the_model(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(made, capsys, "ema.dtype=bfloat16", "model.rope_base=5000.0")
    assert line.startswith(
        "error: ema.dtype: expected float32, got bfloat16: the checkpoint does not fit the changed average"
        f" ({made / 'checkpoints' / 'step-00000002'}: ema/"
    )
    assert line.endswith("has dtype torch.float32, expected torch.bfloat16)")
    assert "rope_base" not in line


@pytest.mark.parametrize(
    ("place", "error", "told"),
    [
        ("trainer.checkpoint.format.digest", OSError(errno.EMFILE, "too many"), "cannot be read (too many)"),
        ("trainer.checkpoint.format._IndexUnpickler.load", OSError(errno.EIO, "bad"), "cannot be read (bad)"),
        (
            "trainer.checkpoint.store.dcp.load",
            RuntimeError("no memory"),
            "cannot be read: RuntimeError: no memory",
        ),
        ("trainer.checkpoint.store.dcp.load", OSError("reset"), "cannot be read: OSError: reset"),
    ],
)
def test_what_cannot_be_read_just_now_is_not_called_damaged(
    made: Path, capsys: pytest.CaptureFixture[str], place: str, error: Exception, told: str
) -> None:
    shutil.copytree(made / "checkpoints" / "step-00000002", made / "checkpoints" / "step-00000001")
    with patch(place, side_effect=error):
        line = refused(made, capsys)
    assert line.startswith(f"error: resume: {made / 'checkpoints' / 'step-00000002'}")
    advice = "; if this does not pass, resume.fallback=true continues from step-00000001 or an older one"
    assert line.endswith(f"{told}{advice}")


def test_a_damaged_checkpoint_is_named_with_what_to_do(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = (made / "checkpoints").glob("*/*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    told = f"error: resume: {file} is damaged (its checksum is not the marker's)"
    assert refused(made, capsys) == f"{told}; restore it from a copy: there is no older checkpoint"
    shutil.copytree(file.parent, file.parent.with_name("step-00000001"))
    assert (
        refused(made, capsys) == f"{told}; resume.fallback=true continues from step-00000001 or an older one"
    )


def loop_of_links(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


def folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES = [
    (name, damage)
    for name in ("state.json", "__0_0.distcp", "COMMIT.json")
    for damage in (loop_of_links, folder_instead, Path.unlink, lambda file: os.truncate(file, 9))
    if (name, damage) != ("COMMIT.json", Path.unlink)  # a folder without its marker is no checkpoint
]


def test_a_run_falls_back_to_the_newest_whole_checkpoint_and_says_so(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every checkpoint but the oldest is damaged, each in another way."""
    oldest = made / "checkpoints" / "step-00000002"
    whole = {path.name: path.read_bytes() for path in oldest.iterdir()}
    damaged = [oldest.with_name(f"step-{step:08d}") for step in range(3, 3 + len(DAMAGES))]
    for path, (name, damage) in zip(damaged, DAMAGES, strict=True):
        shutil.copytree(oldest, path)
        damage(path / name)
    advice = f"resume.fallback=true continues from {damaged[-2].name} or an older one"
    assert refused(made, capsys).endswith(advice)
    assert train(*compose([f"resume={made}", "trainer.steps=2", "resume.fallback=true"])) == 0
    printed = "".join(capsys.readouterr())
    for path, damage in zip(damaged, DAMAGES, strict=True):
        assert f"warning: {path} cannot be used (" in printed, damage
        assert f"it is renamed to {path.name}.stale-1; the run continues from step-00000002" in printed
        assert path.with_name(f"{path.name}.stale-1").is_dir() and not path.exists()
    assert {path.name: path.read_bytes() for path in oldest.iterdir()} == whole


def test_no_checkpoint_is_renamed_where_none_is_whole(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = (made / "checkpoints").glob("*/state.json")
    os.truncate(file, 3)
    assert "restore it from a copy: there is no older checkpoint" in refused(
        made, capsys, "resume.fallback=true"
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            "trainer.optimizers.loss_scale.INITIAL_SCALE",
            "loss_scale: expected a positive, finite scale and a growth of at least 0, got {'scale': -1.0,",
        ),
        ("trainer.optimizers.LossScale.state", "has no tensor loss_scale/scale"),
    ],
)
def test_a_stored_loss_scale_that_cannot_be_used_is_refused(
    change: str,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as saving:
        saving.setattr(change, -1.0 if change.endswith("SCALE") else lambda _: {"other": 1})
        half = "sharding.param_dtype=float16"
        assert train(*compose([*TINY_GPT, half, "trainer.steps=2", f"run_dir={folder}"])) == 0
    line = refused(folder, capsys)
    assert line.startswith(f"error: resume: {folder / 'checkpoints' / 'step-00000002'}") and expected in line


def certain(model: torch.nn.Module, batch: dict[str, torch.Tensor], random: Any) -> torch.Tensor:
    """A metric of the user's: one number, whatever it is asked about."""
    return torch.ones(len(next(iter(batch.values()))))


def test_a_report_knows_the_direction_of_a_metric_that_the_last_session_dropped(tmp_path: Path) -> None:
    overrides = [
        *TINY_GPT,
        "trainer.steps=2",
        "+metrics.sure._target_=tests.unit.test_resume_loading.certain",
        "+metrics.sure.higher_is_better=true",
        f"run_dir={tmp_path / 'run'}",
    ]
    assert train(*compose(overrides)) == 0
    assert train(*compose([f"resume={tmp_path / 'run'}", "trainer.steps=4", "metrics={}"])) == 0
    assert read_run(tmp_path / "run").higher_is_better("sure") is True


class Noted(LanguageModeling):
    """The usual task, which notes the windows that it trains on."""

    seen: list[tuple[int, ...]] = []  # noqa: RUF012

    def losses(self, model: torch.nn.Module, batch: Any, random: Any) -> torch.Tensor:
        if model.training:
            self.seen.extend(map(tuple, batch["tokens"].tolist()))
        return super().losses(model, batch, random)


@pytest.mark.parametrize("of_an_earlier_version", [False, True])
def test_another_batch_size_goes_on_behind_the_samples_that_were_used(
    of_an_earlier_version: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noted = "task._target_=tests.unit.test_resume_loading.Noted"
    run_dir = tmp_path / "run"

    def windows(*overrides: str) -> list[tuple[int, ...]]:
        Noted.seen.clear()
        assert train(*compose([*overrides])) == 0
        return list(Noted.seen)

    whole = windows(*TINY_GPT, noted, "trainer.steps=5", f"run_dir={tmp_path / 'whole'}")
    parts = windows(*TINY_GPT, noted, "trainer.steps=2", f"run_dir={run_dir}")
    if of_an_earlier_version:
        checkpoint = run_dir / "checkpoints" / "step-00000002"
        state = json.loads((checkpoint / SCALARS).read_text())
        del state["progress"]["samples"], state["progress"]["lr"]
        (checkpoint / SCALARS).write_text(json.dumps(state))
        marker = json.loads((checkpoint / MARKER).read_text())
        marker["files"][SCALARS] = digest(checkpoint / SCALARS)
        (checkpoint / MARKER).write_text(json.dumps(marker))
    resumed = (f"resume={run_dir}", "allow_targets=[tests.]")
    parts += windows(*resumed, "trainer.steps=4", "trainer.global_batch_size=4")
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a constant decay reads no batch size
        parts += windows(*resumed, "trainer.steps=6", "trainer.global_batch_size=8")
    assert parts == whole
    assert "learning rate jumps" not in "".join(capsys.readouterr())


def test_a_schedule_that_is_stretched_names_both_learning_rates_and_a_new_seed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = ("schedule=cosine", "schedule.warmup_steps=0", "optimizer.lr=0.01")
    run = [*TINY_GPT, *schedule, "trainer.steps=2", f"run_dir={tmp_path / 'run'}"]
    assert train(*compose(run)) == 0
    assert train(*compose([f"resume={tmp_path / 'run'}", "trainer.steps=4"])) == 0
    printed = "".join(capsys.readouterr())
    (line,) = [line for line in printed.splitlines() if "jumps" in line]
    assert "warning: the learning rate jumps: step 2 had 0, and now the schedule gives it 0.005" in line
    assert "seed was" not in printed
    assert train(*compose([f"fork={tmp_path / 'run'}", "trainer.steps=5", "seed=7"])) == 0
    printed = "".join(capsys.readouterr())
    forks, seed = (
        printed.index("forks "),
        printed.index("seed was 0 and is 7: after step 4 the order of samples"),
    )
    assert printed.index("run directory: ") < forks < seed
