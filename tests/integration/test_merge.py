"""`evaluate=` of `python -m launch.merge`: what the run itself logged is the reference.

A merge that is one of the checkpoints has the evaluation that the run recorded at its step.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import launch.merging.evaluating
from launch.merge import main
from tests.integration.commands import Warm, records, trainer
from tests.makers import TINY_GPT

RUN = (
    *TINY_GPT,
    "ema=constant",
    "ema.decay=0.5",
    "trainer.steps=8",
    "trainer.log_every=4",
    "trainer.eval_every=4",
)


@pytest.fixture(scope="module", params=["none", "fsdp"])
def run_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp(request.param)
    trainer(*RUN, "trainer.save_every=4", f"sharding={request.param}", "run_dir=run", cwd=folder)
    return folder / "run"


def logged(run_dir: Path, step: int) -> dict[str, Any]:
    (record,) = [record for record in records(run_dir) if record["train/step"] == step]
    return record


@pytest.mark.parametrize("weights", ["live", "ema/0.5"])
def test_the_result_is_evaluated_beside_the_newest_checkpoint(
    run_dir: Path,
    weights: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found: list[Any] = []
    tables_of = launch.merging.evaluating.tables_of

    def kept(run: Any, step: int, record: Any, *others: Any) -> Any:
        found.append(record)
        return tables_of(run, step, record, *others)

    monkeypatch.setattr(launch.merging.evaluating, "tables_of", kept)
    arguments = [f"{run_dir}:{weights}", "coefficients=[1,0]", f"out={tmp_path / 'm.safetensors'}"]
    assert main([*arguments, f"evaluate={run_dir}"]) == 0
    (record,) = found
    assert record["eval/live/loss"] == pytest.approx(logged(run_dir, 8)[f"eval/{weights}/loss"], rel=1e-6)
    assert record["eval/ema/merged/loss"] == pytest.approx(
        logged(run_dir, 4)[f"eval/{weights}/loss"], rel=1e-6
    )
    printed = capsys.readouterr().out
    assert "live is" in printed and "m.safetensors" in printed and "EMA merged" in printed


def test_weights_that_do_not_fit_the_run_are_refused_before_anything_is_written(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.safetensors"
    assert main([str(run_dir), "profile=linear", f"out={out}"]) == 0
    tensors = load_file(out)
    name, *_ = tensors
    changed = {
        "lacks": (
            {key: one for key, one in tensors.items() if key != name},
            f"has {name}, the checkpoints do not",
        ),
        "more": ({**tensors, "other": tensors[name].clone()}, "the checkpoints have other, the model of"),
        "shape": ({**tensors, name: tensors[name][:1].clone()}, f"evaluate: {name} has shape"),
    }
    for step, (kind, (content, expected)) in enumerate(changed.items()):
        save_file(content, tmp_path / f"{kind}_{step}.safetensors")
        source = str(tmp_path / f"{kind}_{step}.safetensors")
        arguments = [source, "coefficients=[1]", f"out={tmp_path / 'n'}", f"evaluate={run_dir}"]
        assert main(arguments) == 2
        assert expected in capsys.readouterr().err
        assert not (tmp_path / "n").exists()


def test_an_evaluation_without_data_is_refused_before_anything_is_written(
    tmp_path: Path, warm: Warm, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("One byte after the other. " * 400)
    own = [one for one in RUN if not one.startswith("data.max")]
    text = ("data=text_files", f"data.paths=[{tmp_path / 'text.txt'}]", "trainer.save_every=4", "run_dir=run")
    warm(*own, *text, cwd=tmp_path)
    (tmp_path / "text.txt").unlink()
    run, out = tmp_path / "run", tmp_path / "m.safetensors"
    assert main([str(run), "profile=linear", f"out={out}", f"evaluate={run}"]) == 2
    assert "data.paths" in capsys.readouterr().err
    assert not out.exists()


def test_a_checkpoint_that_was_set_aside_is_not_merged(run_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    aside = run / "checkpoints" / "step-00000006.stale-1"
    shutil.copytree(run / "checkpoints" / "step-00000004", aside)
    for number, source in enumerate((str(run), f"{run}/checkpoints/step-*")):
        out = tmp_path / f"{number}.safetensors"
        assert main([source, "profile=linear", f"out={out}"]) == 0
        with safe_open(out, "pt") as file:
            assert len(json.loads(file.metadata()["merge"])["sources"]) == 2
