"""Data of the user's own, through the command line alone."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from tests.integration.commands import Warm, importable_here, records

SHORT = ("trainer.steps=4", "trainer.log_every=1", "trainer.num_threads=1", "logger=none", "run_dir=run")
SMALL = (*SHORT, "trainer.global_batch_size=8", "trainer.eval_samples=16", "trainer.eval_batch_size=8")

TRANSFORM = """
import os
import random

import torch


class Flip:
    def __init__(self, p):
        self.p = p

    def __call__(self, picture):
        picture = picture.flip(-1) if torch.rand(()) < self.p else picture
        changed = picture // random.randint(1, 4)
        with open(f"seen-{os.getpid()}.txt", "a") as file:
            file.write(f"{changed.tolist()}\\n")
        return changed
"""


def test_latents_are_drawn_by_flow_matching(tmp_path: Path, warm: Warm) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "latents").mkdir()
    for part in range(2):
        latents = random.normal(size=(50, 4, 4, 4)).astype(np.float16)
        np.save(tmp_path / "latents" / f"{part}.npy", latents)
    np.save(tmp_path / "labels.npy", np.arange(100) % 3)
    warm(
        *("experiment=digits_flow", "data=arrays", "data.fields={image: latents/*.npy, label: labels.npy}"),
        *("data.scale={image: 0.5}", "task.image_shape=[4,4,4]", "task.num_classes=3", "task.sample_steps=2"),
        *("model.in_channels=4", "model.image_size=4", "model.hidden=32", "model.depth=1", *SMALL),
        *("model.num_classes=3", "task.sample_count=4"),
        cwd=tmp_path,
    )
    assert np.isfinite(records(tmp_path / "run")[-1]["eval/live/loss"])


def test_features_are_classified_and_a_class_too_many_is_refused(tmp_path: Path, warm: Warm) -> None:
    labels = np.arange(200) % 4
    features = np.random.default_rng(0).normal(size=(200, 6)) + 4 * np.eye(6)[labels]
    np.save(tmp_path / "features.npy", features)
    np.save(tmp_path / "labels.npy", labels)
    overrides = (
        *(
            "model=mlp",
            "task=classification",
            "data=arrays",
            "data.fields={image: features.npy, label: labels.npy}",
        ),
        *("model.in_features=6", "ema=off", *SMALL, "trainer.steps=60", "optimizer.lr=0.01"),
    )
    printed = warm(*overrides, "model.num_classes=3", cwd=tmp_path, code=2)
    assert printed.startswith("error: model.num_classes: expected at least 4")
    assert not (tmp_path / "run").exists()
    warm(*overrides, "model.num_classes=4", cwd=tmp_path)
    assert records(tmp_path / "run")[-1]["eval/live/accuracy"] > 0.9


def test_transforms_change_a_picture_alike_for_any_ranks_and_interruption(tmp_path: Path, warm: Warm) -> None:
    for label in "ab":
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for number in range(10):
            pixels = np.random.default_rng(number).integers(0, 255, (9, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / label / f"{number}.png")
    flip = "data.transforms=[{_target_: my_transforms.Flip, p: 0.5}]"
    overrides = (
        *("model=mlp", "model.in_features=192", "task=classification", "data=image_folder"),
        *("data.path=../pictures", "data.image_size=8", "data.eval_path=../pictures", *SMALL),
    )

    def seen(name: str, *commands: tuple[str, ...], ranks: int = 1) -> set[str]:
        """The pictures that the transform made, also that of the trial before each command."""
        folder = tmp_path / name
        folder.mkdir()
        (folder / "my_transforms.py").write_text(TRANSFORM)
        for command in commands:
            warm(*command, cwd=folder, ranks=ranks, within=importable_here)
        return {line for file in folder.glob("seen-*.txt") for line in file.read_text().splitlines()}

    whole = seen("whole", (*overrides, flip))
    assert len(whole) > 20  # more than there are files
    assert seen("ranks", (*overrides, flip, "sharding=ddp"), ranks=2) == whole
    resume = ("resume=run", "trainer.steps=4", "allow_targets=[my_transforms.]")
    assert seen("resumed", (*overrides, flip, "trainer.steps=2"), resume) == whole
    before, after = (records(tmp_path / name / "run") for name in ("whole", "resumed"))
    assert [r["train/loss"] for r in before] == [r["train/loss"] for r in after]

    broken = "data.transforms=[{_target_: my_transforms.Flip, p: none}]"
    printed = warm(
        *overrides, broken, "run_dir=other", cwd=tmp_path / "whole", code=2, within=importable_here
    )
    assert printed.startswith("error: data.transforms[0] (Flip) fails on ../pictures/a/0.png: TypeError")
    assert not (tmp_path / "whole" / "other").exists()


DROPPING = """
import torch
from trainer.protocols import Splits

class Samples:
    def __init__(self, dropped=()):
        self.dropped = dropped

    def __len__(self):
        return 64

    def __getitems__(self, indices):
        kept = torch.tensor([index for index in indices if index not in self.dropped])
        return {"image": torch.eye(64)[kept], "label": kept % 3}

def samples():
    return Splits(Samples(dropped=[5]), Samples(), {"num_classes": 3})
"""


def test_a_training_batch_without_all_of_its_samples_is_refused(tmp_path: Path, warm: Warm) -> None:
    (tmp_path / "my_samples.py").write_text(DROPPING)
    overrides = (
        *("model=mlp", "model.in_features=64", "task=classification", "model.num_classes=3"),
        *("data=custom", "data._target_=my_samples.samples", *SMALL, "trainer.steps=8"),
    )
    printed = warm(*overrides, cwd=tmp_path, within=importable_here, code=2)
    (error,) = (line for line in printed.splitlines() if line.startswith("error: "))
    assert re.match(
        r"error: task, data: expected one loss for each of 8 samples in step [1-8], got shape \(7,\)", error
    )


FAULTY = """
import torch
from trainer.protocols import Splits

class Samples:
    def __init__(self, fault):
        self.fault = fault

    def __len__(self):
        return 64

    def __getitems__(self, indices):
        image = torch.eye(64)[indices]
        return {
            "scalar": {"t": torch.tensor(1.0), "image": image},
            "short": {"image": image, "t": image[1:]},
            "text": {"image": image, "t": ["a"] * len(indices)},
            "tuple": (image, image),
            "none": {},
        }[self.fault]

def samples(fault):
    return Splits(Samples(fault), Samples(fault), {"num_classes": 3})
"""


def test_a_batch_that_is_no_tensors_with_a_row_per_sample_is_refused_by_its_field(
    tmp_path: Path, warm: Warm
) -> None:
    (tmp_path / "my_faults.py").write_text(FAULTY)
    overrides = (
        *("model=mlp", "model.in_features=64", "task=classification", "model.num_classes=3"),
        *("data=custom", "data._target_=my_faults.samples", *SMALL),
    )
    rows = r"data: expected tensors with one row per sample, \d+ here, got t"
    for fault, expected in {
        "scalar": rf"{rows} of shape \[\]",
        "short": rf"{rows} of shape \[\d+, 64\]",
        "text": f"{rows} as list",
        "tuple": "data: expected a batch of named tensors, got tuple",
        "none": "data: expected a batch of named tensors, got no field",
    }.items():
        printed = warm(*overrides, f"+data.fault={fault}", cwd=tmp_path, within=importable_here, code=2)
        assert re.fullmatch(f"error: {expected}\n", printed)


@contextmanager
def cached_here(rank: int) -> Iterator[None]:
    """Keep the Arrow files that `datasets` makes of Parquet in the current folder, not in the user's."""
    import datasets

    with mock.patch.object(datasets.config, "HF_DATASETS_CACHE", Path.cwd() / "cache"):
        yield


def test_columns_of_hugging_face_files_train_and_resume_bitwise(tmp_path: Path, warm: Warm) -> None:
    datasets = pytest.importorskip("datasets", reason="the test extra is not installed")
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 255, (9, 8, 3), np.uint8)) for _ in range(60)]
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])})
    labelled = datasets.Dataset.from_dict({"img": pictures, "kind": [0, 1] * 30}, features=features)
    datasets.DatasetDict({"train": labelled, "test": labelled.select(range(20))}).save_to_disk(
        tmp_path / "seen"
    )
    ids = random.integers(0, 50, (60, 33)).astype(np.int32)
    (tmp_path / "texts").mkdir()
    for part in range(2):
        rows = datasets.Dataset.from_dict({"input_ids": list(ids[30 * part : 30 * part + 30])})
        rows.to_parquet(tmp_path / "texts" / f"{part}.parquet")
    classification = (
        *("model=mlp", "model.in_features=192", "model.num_classes=null", "task=classification"),
        *("data.path=../seen", "data.columns={image: img, label: kind}", "data.image_size=8"),
        "data.eval_split=test",
    )
    language = (
        *("data.path=../texts/*.parquet", "data.columns={tokens: input_ids}", "model.context=32"),
        *("model.n_layer=1", "model.n_head=2", "model.n_embd=32"),
    )
    for name, overrides in (("classes", classification), ("texts_run", language)):
        folder = tmp_path / name
        folder.mkdir()
        start = (*overrides, "data=hf", *SMALL)
        warm(*start, cwd=folder, within=cached_here)
        warm(*start, "trainer.steps=2", "run_dir=cut", cwd=folder, within=cached_here)
        warm("resume=cut", "trainer.steps=4", cwd=folder, within=cached_here)
        whole, cut = (records(folder / run) for run in ("run", "cut"))
        for key in ("train/loss", "train/grad_norm", "eval/live/loss"):
            assert [r[key] for r in whole if key in r][-1] == [r[key] for r in cut if key in r][-1]
        assert [r["train/loss"] for r in whole] == [r["train/loss"] for r in cut]
    printed = warm(
        *language,
        "data=hf",
        "data.columns={tokens: ids}",
        *SMALL,
        "run_dir=x",
        cwd=folder,
        code=2,
        within=cached_here,
    )
    assert printed.startswith(
        "error: data.columns.tokens: ../texts/0.parquet has no column 'ids', expected input_ids"
    )
    assert not (folder / "x").exists()
