"""Several evaluation sets (`data.eval_sets`), through the command lines alone.

The reference of a set's metrics is a run with the same training whose only evaluation set it is.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch import compare, evaluate
from tests.integration.commands import Warm, deterministic, records

RUN = (
    *("model=mlp", "model.in_features=6", "model.num_classes=3", "task=classification", "data=arrays"),
    *("ema=constant", "ema.decays=[0.5,0.9]", "optimizer.lr=0.01", "logger=none", "trainer.num_threads=1"),
    *("trainer.steps=6", "trainer.eval_every=3", "trainer.log_every=3", "trainer.global_batch_size=8"),
    *("trainer.eval_samples=30", "trainer.eval_batch_size=8", "data.fields={image: x.npy, label: y.npy}"),
)
SETS = (
    "data.eval_fields={image: same.npy, label: same_y.npy}",
    "+data.eval_sets={shifted: {eval_fields: {image: far.npy, label: far_y.npy}}, all: {eval_fields: null}}",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    random = np.random.default_rng(0)
    for name, labels, count, shift in (("x", "y", 90, 0), ("same", "same_y", 50, 0), ("far", "far_y", 20, 2)):
        label = np.arange(count) % 3
        np.save(folder / labels, label)
        np.save(folder / name, random.normal(size=(count, 6)) + np.eye(3, 6)[label] + shift)
    warm(*RUN, *SETS, "run_dir=run", cwd=folder, report=True)
    return folder


def test_each_set_has_the_metrics_of_a_run_with_this_set_alone(folder: Path, warm: Warm) -> None:
    warm(*RUN, "data.eval_fields={image: far.npy, label: far_y.npy}", "run_dir=far", cwd=folder)
    warm(*RUN, SETS[0], "run_dir=alone", cwd=folder)
    for run, far, alone in zip(*(records(folder / name) for name in ("run", "far", "alone")), strict=True):
        common = {
            key: value
            for key, value in deterministic(run).items()
            if "shifted/" not in key and "all/" not in key
        }
        assert common == deterministic(alone)
        expected = {key: value for key, value in far.items() if key.startswith("eval/")}
        assert len(expected) == 3 * 3 + 2 * 2 * 3
        for key, value in expected.items():
            start, _, metric = key.rpartition("/")
            assert run[f"{start}/shifted/{metric}"] == value
        assert "eval/gap/0.9/all/loss_se" in run
    meta = json.loads((folder / "run" / "meta.json").read_text())
    assert (meta["primary_metric"], meta["num_samples"], meta["split_samples"]) == ("loss", 30, 50)
    assert meta["eval_sets"] == {"shifted": 20, "all": meta["eval_sets"]["all"]}
    assert "shifted/accuracy" in meta["higher_is_better"] and "all/ece" in meta["direction_undeclared"]
    assert "eval_sets" not in json.loads((folder / "alone" / "meta.json").read_text())


def test_ranks_do_not_change_the_metrics_of_a_set(folder: Path, warm: Warm) -> None:
    warm(*RUN, *SETS, "run_dir=ranks", "sharding=ddp", cwd=folder, ranks=2)
    one, two = (records(folder / name)[-1] for name in ("run", "ranks"))
    keys = [key for key in one if "/shifted/" in key]
    assert [two[key] for key in keys] == pytest.approx([one[key] for key in keys], rel=1e-4, abs=1e-6)


def test_the_report_has_the_sets_and_a_comparison_can_decide_by_one(folder: Path, warm: Warm) -> None:
    assert "shifted/loss" in (folder / "run" / "report" / "index.html").read_text()
    assert "run,shifted/loss,0.9," in (folder / "run" / "report" / "table.csv").read_text()
    printed = warm("run", "metric=shifted/loss", cwd=folder, main=compare.main)
    by_shifted = printed.partition("other metrics")[0]
    value = records(folder / "run")[-1]["eval/live/shifted/loss"]
    assert f"{value:.4f}" in by_shifted
    refused = warm("run", "metric=shiftd/loss", cwd=folder, main=compare.main, code=2)
    assert refused.startswith("error: metric: expected one of loss, accuracy, ece, shifted/loss,")


def test_a_checkpoint_is_evaluated_on_each_set_again(folder: Path, warm: Warm) -> None:
    printed = warm("run", "out=again.json", cwd=folder, main=evaluate.main)
    assert " and 20 samples of shifted" in printed and "shifted/loss" in printed
    found = json.loads((folder / "again.json").read_text())["metrics"]
    last = records(folder / "run")[-1]
    assert found == {key: value for key, value in last.items() if key.startswith("eval/")}
    other = "+data.eval_sets.more.eval_fields={image: x.npy, label: y.npy}"
    warm("run", other, "weights=live", "out=more.json", cwd=folder, main=evaluate.main)
    assert "eval/live/more/loss" in json.loads((folder / "more.json").read_text())["metrics"]


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ("{far: {eval_fields: {image: no.npy}}}", "data.eval_sets.far: data.eval_fields"),
        ("{far: {path: x}}", "data.eval_sets.far: data.path: arrays takes no such argument"),
        ("{a/b: {shift: null}}", "data.eval_sets: expected names of letters"),
        ("{live: {shift: null}}", "data.eval_sets: expected names of letters"),
        ("{far: x.npy}", "data.eval_sets.far: expected keys of data that differ"),
        ("[far]", "data.eval_sets: expected names with keys of data"),
        (
            "{text: {_target_: trainer.data.python_docs.python_docs}}",
            "data.eval_sets.text: model, task, data",
        ),
    ],
)
def test_a_set_that_cannot_be_loaded_is_named(folder: Path, warm: Warm, sets: str, expected: str) -> None:
    printed = warm(*RUN, f"+data.eval_sets={sets}", "run_dir=bad", cwd=folder, code=2)
    assert printed.startswith(f"error: {expected}")
    assert not (folder / "bad").exists()


def test_a_folder_with_other_classes_is_no_set_of_these(tmp_path: Path, warm: Warm) -> None:
    for path in ("cats_and_dogs/cat", "cats_and_dogs/dog", "dogs_and_emus/dog", "dogs_and_emus/emu"):
        (tmp_path / path).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / path / f"{number}.png")
    images = ("data=image_folder", "data.path=cats_and_dogs", "data.image_size=8")
    printed = warm(
        *("model=mlp", "model.in_features=192", "task=classification", "logger=none", "run_dir=run"),
        *(*images, "+data.eval_sets={new: {path: dogs_and_emus}}"),
        cwd=tmp_path,
        code=2,
    )
    assert printed.startswith(
        "error: data.eval_sets.new: has the classes dog, emu, expected those of data: cat, dog;"
    )
