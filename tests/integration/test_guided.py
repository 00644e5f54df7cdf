"""Flow matching with guidance through the command line: metrics for each scale, grids, functions of the user."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.integration.commands import Warm, importable_here, records
from tests.makers import TINY_GPT

PARTS = """
import torch
from torch import nn

def halves(images, rows: int = 4):
    return torch.cat([images[:, :, :rows].mean((2, 3)), images[:, :, rows:].mean((2, 3))], 1)

class Decoder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Upsample(scale_factor=width)

    def forward(self, latents):
        return self.up(latents[:, :3])
"""
SMALL = (
    *("experiment=digits_guided", "trainer.steps=4", "trainer.eval_every=2", "trainer.log_every=1"),
    *("trainer.global_batch_size=8", "trainer.eval_samples=16", "trainer.eval_batch_size=8"),
    *("trainer.num_threads=1", "logger=none", "schedule.warmup_steps=0"),
    *("model.depth=1", "model.hidden=32", "ema.decays=[0.5,0.9]"),
    *("task.guidance=[1,2]", "task.distance_steps=2", "task.sample_steps=2", "task.sample_count=4"),
)
GRIDS = ["step-00000002.png", "step-00000004.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_parts.py").write_text(PARTS)
    return tmp_path


def evaluated(path: Path) -> dict[str, float]:
    return {key: value for key, value in records(path)[-1].items() if key.startswith("eval/")}


def grids(path: Path) -> list[bytes]:
    assert sorted(file.name for file in (path / "samples").iterdir()) == GRIDS
    return [(path / "samples" / name).read_bytes() for name in GRIDS]


def test_the_guided_experiment_is_the_same_resumed_and_nearly_on_two_ranks(folder: Path, warm: Warm) -> None:
    features = "task.features={_target_: my_parts.halves, rows: 3}"
    own = (*SMALL, features)
    warm(*own, "run_dir=whole", cwd=folder, within=importable_here)
    found = evaluated(folder / "whole")
    names = [f"{name}_w{w}" for w in (1, 2) for name in ("frechet_distance", "precision", "recall")]
    for weights in ("live", "ema/0.5", "ema/0.9"):
        assert all(np.isfinite(found[f"eval/{weights}/{name}"]) for name in names)
    assert found["eval/live/frechet_distance_w1"] != found["eval/live/frechet_distance_w2"]
    first, last = grids(folder / "whole")
    assert first != last

    warm(*own, "run_dir=cut", "trainer.steps=2", cwd=folder, within=importable_here)
    again = ("resume=cut", "trainer.steps=4", "allow_targets=[my_parts.]")
    warm(*again, cwd=folder, within=importable_here)
    assert evaluated(folder / "cut") == found
    assert grids(folder / "cut") == [first, last]

    warm(*own, "run_dir=two", "sharding=fsdp", ranks=2, cwd=folder, within=importable_here)
    assert evaluated(folder / "two") == pytest.approx(found, abs=1e-4)
    assert len(grids(folder / "two")) == 2


def test_latents_are_shown_as_the_pictures_of_their_decoder(folder: Path, warm: Warm) -> None:
    random = np.random.default_rng(0)
    np.save(folder / "latents.npy", random.normal(size=(60, 4, 4, 4)).astype(np.float16))
    np.save(folder / "labels.npy", np.arange(60) % 3)
    warm(
        *(*SMALL, "data=arrays", "data.fields={image: latents.npy, label: labels.npy}", "trainer.steps=2"),
        *("task.image_shape=[4,4,4]", "task.num_classes=3", "model.num_classes=3"),
        *("model.in_channels=4", "model.image_size=4", "task.latent_scale=0.5", "run_dir=run"),
        "task.decoder={_target_: my_parts.Decoder, width: 8}",
        cwd=folder,
        within=importable_here,
    )
    with Image.open(folder / "run" / "samples" / GRIDS[0]) as grid:
        pixels = np.asarray(grid)
    # Two scales for live and the best average, four pictures of 32 x 32 pixels each; neighbours differ by 2 + margins.
    assert pixels.shape[0] == 2 * (66 + 22 + 12)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    assert np.isfinite(evaluated(folder / "run")["eval/live/frechet_distance_w2"])


def test_grids_of_a_task_that_draws_no_images_are_refused(tmp_path: Path, warm: Warm) -> None:
    line = warm(*TINY_GPT, "trainer.sample_grids=true", "run_dir=run", cwd=tmp_path, code=2)
    assert "error: trainer.sample_grids: expected false, because LanguageModeling draws no images" in line
