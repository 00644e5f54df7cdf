"""Runs that start from weights: with learning rate 0 the first evaluation has the loss of the source."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from launch.export import main as export
from launch.sweeps.backends.base import resuming
from launch.sweeps.directory import Sweep
from launch.sweeps.expand import expand
from tests.integration.commands import Warm, last, records, trainer
from tests.makers import TINY_GPT
from trainer.rundir.directory import RunDir

TOLERANCE = 1e-6
RUN = (*TINY_GPT, "ema.decay=0.5")
STILL = (*RUN, "trainer.steps=2", "trainer.eval_every=1", "optimizer.lr=0")
LIVE, AVERAGE = "eval/live/loss", "eval/ema/0.5/loss"
FSDP = (2, ("sharding=fsdp",))
ALONE = (1, ())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    """A folder with a run, and its average in files of three kinds."""
    folder = tmp_path_factory.mktemp("source")
    warm(*RUN, "trainer.steps=12", "optimizer.lr=0.01", "seed=3", "run_dir=run", cwd=folder)
    assert export([str(folder / "run"), "weights=ema", f"out={folder / 'ema.safetensors'}"]) == 0
    assert export([str(folder / "run"), "weights=ema", f"out={folder}/parts/", "max_shard_size=30KB"]) == 0
    weights = load_file(folder / "ema.safetensors")
    torch.save({"state_dict": {f"module.{name}": one for name, one in weights.items()}}, folder / "ema.pt")
    live, average = last(folder / "run", [LIVE, AVERAGE])
    assert abs(live - average) > 1e-3
    return folder


@pytest.mark.parametrize(("world", "sharding"), [ALONE, FSDP], ids=["alone", "fsdp2"])
@pytest.mark.parametrize(
    ("text", "metric"),
    [
        ("run", LIVE),
        ("run:ema@12", AVERAGE),
        ("ema.safetensors", AVERAGE),
        ("parts", AVERAGE),
        ("ema.pt", AVERAGE),
    ],
)
def test_the_first_evaluation_is_that_of_the_source(
    source: Path, tmp_path: Path, warm: Warm, text: str, metric: str, world: int, sharding: tuple[str, ...]
) -> None:
    warm(*STILL, *sharding, f"init_from={source / text}", "run_dir=run", cwd=tmp_path, ranks=world)
    expected = last(source / "run", [metric])[0]
    # The average, too, starts from these weights and not from the initial ones.
    first = records(tmp_path / "run")[0]
    assert [first[LIVE], first[AVERAGE]] == pytest.approx([expected, expected], abs=TOLERANCE, rel=0)


def test_another_head_keeps_its_initial_weights(source: Path, tmp_path: Path, warm: Warm) -> None:
    deeper = ("model.n_layer=3", "init.missing=[blocks.2.*]", "init.rename=['^x\\.(.*)$ -> \\1']")
    weights = {f"x.{name}": value for name, value in load_file(source / "ema.safetensors").items()}
    save_file(weights, tmp_path / "x.safetensors")
    printed = warm(*STILL, *deeper, "init_from=x.safetensors", "run_dir=run", cwd=tmp_path)
    assert "6 of 20 tensors of the model keep their initial weights, and 0 of the source" in printed


def test_bad_names_end_with_code_2_and_one_line_before_anything_is_made(source: Path, tmp_path: Path) -> None:
    done = trainer(
        *STILL, "model.n_layer=3", f"init_from={source / 'run'}:ema", "run_dir=run", cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == (
        "error: init_from: the source has no blocks.2.attention_norm.weight and 5 more;"
        " keep initial weights by init.missing=[PATTERN]"
    )
    assert not list(tmp_path.iterdir())


def test_a_run_resumes_without_its_source_and_exports_where_it_came_from(
    source: Path, tmp_path: Path, warm: Warm
) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes((source / "ema.safetensors").read_bytes())
    warm(*RUN, "trainer.steps=2", "init_from=w.safetensors", "run_dir=run", cwd=tmp_path)
    facts = {
        "source": "w.safetensors",
        "path": str(file),
        "kind": "safetensors",
        "sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest()},
    }
    assert RunDir.open(tmp_path / "run").meta["init_from"] == facts
    file.unlink()
    warm("resume=run", "trainer.steps=4", cwd=tmp_path)
    assert RunDir.open(tmp_path / "run").meta["init_from"] == facts
    assert export([str(tmp_path / "run"), "weights=ema", f"out={tmp_path / 'out.safetensors'}"]) == 0
    with safe_open(tmp_path / "out.safetensors", "pt") as out:
        assert json.loads(out.metadata()["init_from"]) == facts
    printed = warm("resume=run", "trainer.steps=6", f"init_from={source / 'run'}", cwd=tmp_path, code=2)
    assert "init_from: " in printed and "start a new run from other weights" in printed
    assert records(tmp_path / "run")[-1]["train/step"] == 4


def test_the_runs_of_a_sweep_start_from_the_sources_that_it_names(
    source: Path, tmp_path: Path, warm: Warm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = expand(["-m", *STILL, f"init_from={source / 'run'},{source / 'ema.safetensors'}"])
    sweep = Sweep.create("s", plan.runs, plan.launch)
    runs = [sweep.run_dir(job) for job in sweep.jobs]
    for run in runs:
        warm(*resuming(str(run), []), cwd=tmp_path)
    found = {RunDir.open(run).meta["init_from"]["kind"]: last(run, [LIVE])[0] for run in runs}
    live, average = last(source / "run", [LIVE, AVERAGE])
    assert found == pytest.approx({"run": live, "safetensors": average}, abs=TOLERANCE, rel=0)
    marker = source / "run" / "checkpoints" / "step-00000012" / "COMMIT.json"
    digests = [RunDir.open(run).meta["init_from"]["sha256"] for run in runs]
    assert {marker.relative_to(source / "run").as_posix(): sha256(marker)} in digests


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
