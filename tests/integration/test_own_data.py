"""Data of the user's own, through the command line alone."""

from pathlib import Path

import numpy as np

from tests.integration.commands import Warm, records

SHORT = ("trainer.steps=4", "trainer.log_every=1", "trainer.num_threads=1", "logger=none", "run_dir=run")
SMALL = (*SHORT, "trainer.global_batch_size=8", "trainer.eval_samples=16", "trainer.eval_batch_size=8")


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
