"""The weights that a run's averages give to the weights of each step, read off the averages of a real command line.

The model and the optimizer are those of `launch.certifying.impulse`: an average in float64 *is* its row of weights,
which must be `ema.rules.profile`.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ema.config import EMAConfig
from ema.posthoc import rows, saved_snapshot
from ema.rules import profile
from ema.state import COUNTERS, RULE
from tests.integration.commands import Warm, importable_here, saved

STEPS, CUT = 24, 9
FIRST_RELEASE = Path(__file__).parents[1] / "fixtures" / "first_release" / "run_1_rank"
PARTS = """
import torch
from launch.certifying import impulse
from launch.certifying.impulse import Next, Unit
from trainer.protocols import Splits

class Rows:
    def __len__(self):
        return 16

    def __getitems__(self, indices):
        return {"x": torch.ones(len(indices), 1)}

class Sum(impulse.Sum):
    primary_metric = "loss"
    higher_is_better = ()
    metric_units = {}

    def metrics(self, model, batch, random):
        return {"loss": self.losses(model, batch, random)}

    def tokens_per_sample(self, batch):
        return 0

def splits():
    return Splits(Rows(), Rows(), {})

def mean(t, config):
    return 1 - 1 / (t + 2)
"""
RULES: dict[str, dict[str, Any]] = {
    "constant": {"decay": 0.9},
    "scaled": {"decay": 0.9, "reference_batch_size": 8},
    "warmup": {"type": "warmup", "decay": 0.8},
    "halflife": {"type": "halflife", "halflife_kimg": 0.02, "rampup_ratio": 0.3},
    "power": {"type": "power", "sigma_rel": 0.1},
    "fraction": {"type": "fraction"},
    "cosine": {"type": "cosine", "decay": 0.8},
    "debiased": {"type": "debiased", "decay": 0.9},
    "own": {"rule": "my_parts.mean"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "_late": {"start_iter": 5},
    "_share": {"start_iter": 0.5},
    "_every": {"update_every": 3},
    "_both": {"start_iter": 4, "update_every": 5},
}
AVERAGES = {rule + name: {**own, **more} for rule, own in RULES.items() for name, more in VARIANTS.items()}
RUN = (
    *("model=custom", "model._target_=my_parts.Unit", f"+model.size={STEPS + 1}"),
    *("optimizer=custom", "optimizer._target_=my_parts.Next", "data=custom", "data._target_=my_parts.splits"),
    *("task=custom", "task._target_=my_parts.Sum", "trainer.global_batch_size=4", "trainer.eval_samples=4"),
    *(
        f"trainer.steps={STEPS}",
        f"trainer.eval_every={STEPS}",
        "trainer.log_every=10",
        "trainer.num_threads=1",
    ),
    *(
        "logger=none",
        "ema=constant",
        "ema.dtype=float64",
        "ema.num_iterations=24",
        "allow_targets=[my_parts.,launch.certifying.]",
    ),
)


def hydra(value: object) -> str:
    """A value as Hydra's command line writes it."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{hydra(one)}" for key, one in value.items()) + "}"
    return str(value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_parts.py").write_text(PARTS)
    return tmp_path


def mean(t: int, config: EMAConfig) -> float:
    """The rule of PARTS."""
    return 1 - 1 / (t + 2)


def state_of(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    prefix = f"ema/{name}/"
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def row_of(state: Mapping[str, torch.Tensor], last: int) -> np.ndarray:
    """The row that follows from the saved counters and rule."""
    snapshot = saved_snapshot(state, mean if b"my_parts" in bytes(state[RULE].tolist()) else None)
    blocks = [block for _, block in rows([snapshot], last)]
    return torch.cat(blocks[::-1])[:, 0].numpy()


def check(run_dir: Path, averages: Mapping[str, Mapping[str, Any]]) -> None:
    """Every average is its profile, and so is the row of its saved counters."""
    tensors, _ = saved(run_dir)
    for name, fields in averages.items():
        state, start = state_of(tensors, name), fields.get("start_iter", 0)
        start = round(start * STEPS) if isinstance(start, float) else start
        config = EMAConfig(**{"batch_size": 4, "num_iterations": STEPS, **fields, "start_iter": start})
        expected = profile(config, STEPS, mean if config.rule else None)
        assert int(state[COUNTERS][3]) == start, name
        for found in (state["weight"].numpy(), row_of(state, STEPS)):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12, err_msg=name)


def test_the_averages_of_a_run_have_the_weights_of_their_profiles(folder: Path, warm: Warm) -> None:
    warm(*RUN, f"ema.averages={hydra(AVERAGES)}", "run_dir=run", cwd=folder, within=importable_here)
    check(folder / "run", AVERAGES)


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_a_resumed_run_absorbs_the_first_weights_once(sharding: str, folder: Path, warm: Warm) -> None:
    """Cut before and after the starts; an average that is new in the second session begins with the loaded weights."""
    kept = {name: one for name, one in AVERAGES.items() if not name.endswith("_share")}
    short = [f"ema.averages={hydra(kept)}", f"trainer.steps={CUT}", "run_dir=run", f"sharding={sharding}"]
    ranks = 2 if sharding == "fsdp" else 1
    warm(*RUN, *short, cwd=folder, within=importable_here, ranks=ranks)
    more = [
        f"trainer.steps={STEPS}",
        "+ema.averages.new={decay:0.5}",
        "allow_targets=[my_parts.,launch.certifying.]",
    ]
    warm("resume=run", *more, cwd=folder, within=importable_here, ranks=ranks)
    check(folder / "run", kept)
    tensors, _ = saved(folder / "run")
    new = state_of(tensors, "new")
    expected = [0.0] * CUT + profile(EMAConfig(decay=0.5), STEPS - CUT)
    np.testing.assert_allclose(new["weight"].numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(row_of(new, STEPS), expected, atol=1e-12)


def test_a_run_from_other_weights_absorbs_these_first(folder: Path, warm: Warm) -> None:
    few = ["ema.decay=0.9", "trainer.steps=3"]
    warm(*RUN, *few, "run_dir=first", cwd=folder, within=importable_here)
    warm(*RUN, *few, "run_dir=next", "init_from=first:live", cwd=folder, within=importable_here)
    found = saved(folder / "next")[0]["ema/0.9/weight"].numpy()
    expected = [0.0] * 3 + profile(EMAConfig(decay=0.9), 3)
    np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-12)


def test_an_average_of_an_earlier_version_keeps_its_recorded_origin(folder: Path, warm: Warm) -> None:
    """The first release absorbed the weights after step 1 first. Its averages go on, and their row is known."""
    made = shutil.copytree(FIRST_RELEASE, folder / "run")
    before = saved_snapshot(state_of(saved(made)[0], "0.99"))
    assert (before.step, before.start) == (4, 1)
    warm(f"resume={made}", "trainer.steps=6", cwd=folder)
    after = saved_snapshot(state_of(saved(made)[0], "0.99"))
    assert (after.step, after.start) == (6, 1)
