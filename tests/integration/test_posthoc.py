"""`ema=posthoc`: the snapshots that a run keeps, and `polyak posthoc`, which makes other averages from them."""

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ema.state import RULE
from launch.evaluate import main as evaluate
from launch.posthoc import main as posthoc
from launch.synthesizing import basis
from tests.integration.commands import Warm, last
from tests.makers import TINY_GPT
from trainer.checkpoint.format import CheckpointError
from trainer.checkpoint.store import TensorReader, stored_tensors
from trainer.distributed.processes import own_rank

SMALL = (*TINY_GPT, "model.n_layer=1")
RUN = (*SMALL, "ema=posthoc", "ema.snapshots=4", "optimizer.lr=0.01", "trainer.steps=8")


def snapshots(run: Path) -> dict[str, dict[str, bytes]]:
    """Bytes of all tensors of each snapshot."""
    found = {}
    for path in sorted((run / "snapshots").glob("step-*")):
        if path.suffix:
            continue
        reader = TensorReader(path)
        # The rule has the length of the run, in which the runs of a test may differ.
        keys = [key for key in stored_tensors(path) if not key.endswith(RULE)]
        found[path.name] = {
            key: reader.read(key).flatten().view(torch.uint8).numpy().tobytes() for key in keys
        }
    return found


@pytest.mark.parametrize(("world", "sharding"), [(1, ()), (2, ("sharding=fsdp",))], ids=["alone", "fsdp2"])
def test_a_series_has_the_averages_of_its_steps_and_goes_on_after_a_stop(
    tmp_path: Path, warm: Warm, world: int, sharding: tuple[str, ...]
) -> None:
    warm(*RUN, *sharding, "trainer.save_every=4", "run_dir=whole", cwd=tmp_path, ranks=world)
    series = snapshots(tmp_path / "whole")
    assert list(series) == [f"step-{step:08d}" for step in (0, 2, 4, 6, 8)]
    initial = series.pop("step-00000000")
    assert all(key.startswith("model/") for key in initial)
    for step in ("step-00000004", "step-00000008"):
        reader = TensorReader(tmp_path / "whole" / "checkpoints" / step)
        assert series[step] == {key: reader.read(key).numpy().tobytes() for key in series[step]}
    warm(*RUN, *sharding, "trainer.steps=4", "run_dir=halved", cwd=tmp_path, ranks=world)
    warm("resume=halved", "trainer.steps=8", cwd=tmp_path, ranks=world)
    resumed = snapshots(tmp_path / "halved")
    assert resumed.pop("step-00000000") == initial
    for step in ("step-00000002", "step-00000004", "step-00000006", "step-00000008"):
        assert resumed[step] == series[step], step
    # A session that keeps no more snapshots makes steps again too: the later ones are not of its weights.
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "step-00000008")
    warm("resume=whole", "ema.snapshots=0", "optimizer.lr=0.1", cwd=tmp_path, ranks=world)
    left = ["step-00000000", "step-00000002", "step-00000004"]
    assert list(snapshots(tmp_path / "whole")) == left


TRACKED = (
    "ema.averages={a: {type: power, sigma_rel: 0.05}, b: {type: power, sigma_rel: 0.1},"
    " mid: {type: power, sigma_rel: 0.07}, c: {decay: 0.8}}"
)


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    """A folder with a run of 2 ranks that keeps snapshots, and two averages to compare with."""
    folder = tmp_path_factory.mktemp("series")
    overrides = (TRACKED, "ema.snapshots=12", "trainer.steps=24", "trainer.eval_every=24", "sharding=fsdp")
    warm(*RUN, *overrides, "run_dir=run", cwd=folder, ranks=2)
    return folder


@pytest.mark.parametrize(
    ("world", "sharding", "target"),
    [(1, "none", "decay=0.8"), (2, "fsdp", "sigma_rel=0.05,0.07"), (4, "fsdp", "decay=0.8")],
)
def test_what_is_made_agrees_with_what_was_tracked(
    series: Path, tmp_path: Path, warm: Warm, world: int, sharding: str, target: str
) -> None:
    out = tmp_path / "result.json"
    words = (target, "basis=live,ema/a,ema/b", f"sharding={sharding}", f"out={out}")
    printed = warm(str(series / "run"), *words, cwd=series, ranks=world, main=posthoc)
    made = json.loads(out.read_text())["averages"]
    name, tracked = ("decay 0.8", "ema/c") if "decay" in target else ("sigma_rel 0.07", "ema/mid")
    for half in ("half_a", "half_b"):
        assert made[name][half] == pytest.approx(made[tracked][half], abs=1e-4)
        assert abs(made["ema/c"][half] - made["live"][half]) > 1e-3  # which is not the live weights
    if "0.05" in target:
        assert made["sigma_rel 0.05"]["predicted_error"] < 1e-4  # a stored average but for its rounding
    assert "half B" in printed and "result.json" in printed


def test_a_sharded_series_of_changes_goes_on_bit_for_bit_and_makes_what_was_tracked(
    tmp_path: Path, warm: Warm
) -> None:
    halved = ("ema.snapshots=12", "ema.snapshot_dtype=bfloat16", "trainer.steps=24", "trainer.save_every=12")
    warm(*RUN, TRACKED, *halved, "sharding=fsdp", "run_dir=run", cwd=tmp_path, ranks=2)
    series = snapshots(tmp_path / "run")
    assert sum(key.startswith("change/a/") for key in series["step-00000024"]) == 8
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000024")
    warm("resume=run", cwd=tmp_path, ranks=2)
    assert len(list((tmp_path / "run" / "snapshots").glob("*.stale-1"))) == 6
    assert snapshots(tmp_path / "run") == series
    out = tmp_path / "result.json"
    words = ("sigma_rel=0.07", "decay=0.8", "basis=live,ema/a,ema/b", f"out={out}", "sharding=none")
    warm("run", *words, cwd=tmp_path, main=posthoc)
    made = json.loads(out.read_text())["averages"]
    assert made["sigma_rel 0.07"]["half_b"] == pytest.approx(made["ema/mid"]["half_b"], abs=1e-4)
    assert made["decay 0.8"]["half_b"] == pytest.approx(made["ema/c"]["half_b"], abs=1e-4)


def test_a_damaged_snapshot_is_named_and_left_out(series: Path, tmp_path: Path, warm: Warm) -> None:
    shutil.copytree(series / "run", tmp_path / "run")
    damaged = tmp_path / "run" / "snapshots" / "step-00000012"
    file = next(damaged.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (tmp_path / "run" / "snapshots" / "step-00000006" / "COMMIT.json").write_text("{}")
    printed = warm("run", "sigma_rel=0.07", "basis=ema/b", cwd=tmp_path, main=posthoc)
    assert f"note: left out: {file}" in printed and "step-00000006" in printed
    assert "sigma_rel 0.07" in printed


def where_rank_1_cannot_read(arguments: list[str]) -> int:
    """`polyak posthoc` where one of two snapshots can be read by rank 0 alone."""

    def read(path: Path) -> dict[str, Tensor]:
        if own_rank() == 1 and path.parent.name == "snapshots" and path.name == "step-00000012":
            raise CheckpointError(f"{path} cannot be read: no answer")
        return stored_tensors(path)

    with patch.object(basis, "stored_tensors", read):
        return posthoc(arguments)


def test_a_snapshot_that_one_rank_cannot_read_is_left_out_on_all(
    series: Path, tmp_path: Path, warm: Warm
) -> None:
    out = tmp_path / "result.json"
    words = ("sigma_rel=0.07", "basis=live,ema/a,ema/b", f"out={out}", "sharding=fsdp")
    printed = warm(str(series / "run"), *words, cwd=series, ranks=2, main=where_rank_1_cannot_read)
    assert "step-00000012 cannot be read: no answer" in printed
    made = json.loads(out.read_text())["averages"]
    assert made["sigma_rel 0.07"]["half_b"] == pytest.approx(made["ema/mid"]["half_b"], abs=1e-4)


def test_weights_of_another_run_are_named_and_left_out(series: Path, tmp_path: Path, warm: Warm) -> None:
    shutil.copytree(series / "run", tmp_path / "run")
    own = ("ema.snapshots=12", "trainer.steps=12", "optimizer.lr=0.02", "run_dir=other")
    warm(*RUN, TRACKED, *own, cwd=tmp_path)
    foreign, misnamed = (tmp_path / "run/snapshots" / f"step-{step:08d}" for step in (12, 6))
    shutil.rmtree(foreign)
    shutil.copytree(tmp_path / "other/snapshots/step-00000012", foreign)
    shutil.rmtree(misnamed)
    shutil.copytree(tmp_path / "run/snapshots/step-00000004", misnamed)
    out = tmp_path / "result.json"
    words = ("sigma_rel=0.07", "basis=live,ema/a,ema/b", f"out={out}")
    printed = warm("run", *words, cwd=tmp_path, main=posthoc)
    assert f"note: left out: {foreign}: " in printed and "has no configuration with SHA-256" in printed
    assert f"note: left out: {misnamed}/state.json is of step 4" in printed
    made = json.loads(out.read_text())["averages"]
    assert made["sigma_rel 0.07"]["half_b"] == pytest.approx(made["ema/mid"]["half_b"], abs=1e-4)


def test_the_chosen_average_is_exported_with_its_sources(series: Path, tmp_path: Path, warm: Warm) -> None:
    out = tmp_path / "best.safetensors"
    words = ("decay=best,0.5", "basis=ema/a", f"export={out}", f"out={tmp_path / 'r.json'}")
    printed = warm(str(series / "run"), *words, "sharding=fsdp", cwd=series, ranks=2, main=posthoc)
    assert {path.name for path in tmp_path.glob("r.*")} == {"r.json", "r.png", "r.svg"}
    assert printed.count("  decay 0.5: ") == 1 and " lag 0:" not in printed  # none is made twice
    result = json.loads((tmp_path / "r.json").read_text())
    with safe_open(out, "pt") as file:
        facts = json.loads(file.metadata()["posthoc"])
    assert facts["average"] == result["best"]
    assert sum(one["coefficient"] for one in facts["sources"]) == pytest.approx(1)
    named = tmp_path / "named.safetensors"
    worst = ("fraction=9", "basis=ema/a", f"export={named}", f"out={tmp_path / 'n.json'}")
    assert "exported fraction 9" in warm(str(series / "run"), *worst, cwd=series, main=posthoc)
    assert json.loads((tmp_path / "n.json").read_text())["best"] != "fraction 9"
    warm(*SMALL, "trainer.steps=1", "optimizer.lr=0", f"init_from={out}", "run_dir=next", cwd=tmp_path)
    both = [result["averages"][result["best"]][half] for half in ("half_a", "half_b")]
    assert last(tmp_path / "next", ["eval/live/loss"])[0] == pytest.approx(sum(both) / 2, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["weights=live"], "weights: unknown key; expected decay, sigma_rel,"),
        (["decay=1.5"], "error: decay: expected a number in [0, 1], got 1.5"),
        (["sigma_rel=2"], "error: sigma_rel: expected a number in (0, 0.2887), got 2"),
        (["halflife=-5"], "error: halflife: expected a number above 0, got -5"),
        (["decay=x"], "error: decay: expected a number, got x"),
        (["profile=minus_sqrt"], "window: expected with profile=minus_sqrt"),
        (["profile=minus_sqrt", "window=50"], "minus_sqrt 50: window: expected 1 to 25 weights, got 50"),
        (["profile=w.txt", "basis=ema/a,ema/b", "step=24"], "w.txt: expected weights with sum 1"),
        (["basis=live,ema/no"], "basis: expected names or patterns of live, ema/power_sigma0.05"),
        (["out=w.svg"], "w.svg is the file of a picture; expected a new name with another suffix"),
        (["window=5"], "window: read only with profile="),
        (["profile=nothing"], "profile: expected minus_sqrt, linear, cosine, uniform, or FILE.txt"),
        (["decay=0.9,0.9"], "decay 0.9: expected each average once"),
        (["step=7"], "/run has no checkpoint of step 7; checkpoints exist for step 24"),
        (["step=best"], "step: expected last or a number of steps"),
        (["export=x.pt"], "export: expected FILE.safetensors, got x.pt"),
        (["export=no/x.safetensors"], "export: the folder no for x.safetensors does not exist"),
        (["export=x.safetensors", "out=x.safetensors"], "export: x.safetensors is the file of out="),
        (["step=-1"], "step: expected last or a number of steps, got '-1'"),
    ],
)
def test_bad_input_is_one_line(series: Path, warm: Warm, words: list[str], expected: str) -> None:
    (series / "w.txt").write_text("1.0 0.5")
    before = sorted((series / "run").rglob("*"))
    (line,) = warm("run", *words, cwd=series, code=2, main=posthoc).splitlines()
    assert line.startswith("error: ") and expected in line
    assert sorted((series / "run").rglob("*")) == before


def test_weights_that_no_snapshot_has_are_evaluated_with_an_unknown_error(tmp_path: Path, warm: Warm) -> None:
    warm(*RUN, "run_dir=run", cwd=tmp_path)
    words = ("run", "decay=0", "basis=ema/power_sigma0.05", "out=found.json")
    printed = warm(*words, cwd=tmp_path, main=posthoc)
    assert "the target is the weights of its own step, and the snapshots cannot make these" in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["averages"]["decay 0"]["predicted_error"] is None


def test_averages_in_a_short_dtype_and_a_later_start_are_noted(tmp_path: Path, warm: Warm) -> None:
    warm(*RUN, "ema.dtype=bfloat16", "ema.start_iter=2", "run_dir=run", cwd=tmp_path)
    printed = warm("run", "decay=0.5", cwd=tmp_path, main=posthoc)
    assert (
        "in bfloat16: the rounding of each update adds up, and the errors can be larger than predicted"
        in printed
    )
    assert "note: the averages begin with the weights of step 2, as the stored ones do" in printed


def test_a_fork_with_a_decay_is_compared_with_and_leaves_all_else_as_it_was(
    tmp_path: Path, warm: Warm
) -> None:
    warm(*RUN, "trainer.save_every=4", "run_dir=base", cwd=tmp_path)
    warm("fork=base@4", "schedule=wsd", "schedule.decay_fraction=0.5", "run_dir=cooled", cwd=tmp_path)
    found = []
    for number, more in enumerate(([], ["cooldown=cooled"])):
        warm("base", "decay=0.7", *more, f"out={number}.json", cwd=tmp_path, main=posthoc)
        found.append(json.loads((tmp_path / f"{number}.json").read_text()))
    assert found[0]["averages"] == found[1]["averages"] and "cooldown" not in found[0]
    cooled = found[1]["cooldown"]
    (loss,) = last(tmp_path / "cooled", ["eval/live/loss"])
    assert (cooled["half_a"] + cooled["half_b"]) / 2 == pytest.approx(loss, abs=1e-6)
    assert (cooled["run"], cooled["forked_at"]) == ("cooled", 4)
    refusal = warm("cooled", "cooldown=base", cwd=tmp_path, main=posthoc, code=2)
    assert "cooldown: expected a run that was forked from" in refusal
    refusal = warm("base", "cooldown=cooled", "step=4", cwd=tmp_path, main=posthoc, code=2)
    assert f"cooldown: step: {tmp_path}/cooled has no checkpoint of step 4; checkpoints exist" in refusal
    assert f"the averages of {tmp_path}/base are made at step 4" in refusal


def test_the_statistics_that_do_not_fit_the_averages_are_named_as_by_the_run(
    tmp_path: Path, warm: Warm
) -> None:
    small = ("experiment=digits_noise", "model=resnet", "model.widths=[4]", "model.blocks_per_stage=1")
    kept = (
        "ema=posthoc",
        "ema.decays=[]",
        "ema.snapshots=2",
        "logger=none",
        "trainer.num_threads=1",
        "trainer.steps=4",
    )
    printed = warm(*small, *kept, "trainer.eval_samples=5000", "run_dir=run", cwd=tmp_path).splitlines()
    (told,) = [
        line for line in printed if line.startswith("warning: ema.batchnorm_batches: 0 evaluates each")
    ]
    assert told.endswith(" or ema.average_buffers=['*running_*'], by resume= or anew")
    assert told in warm("run", "decay=0.5", cwd=tmp_path, main=posthoc).splitlines()
    assert told in warm("run", cwd=tmp_path, main=evaluate).splitlines()
    assert told not in warm("run", "weights=live", cwd=tmp_path, main=evaluate)
    assert told not in warm("resume=run", "ema=off", "trainer.steps=6", cwd=tmp_path)
    assert told in warm("run", "decay=0.5", "step=4", cwd=tmp_path, main=posthoc).splitlines()
    split = "all 359 samples of the evaluation split (data.eval_fraction=0.2)"
    assert f"trainer.eval_samples: evaluates on {split}; 5000 are more than there are" in printed
