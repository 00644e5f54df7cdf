"""The last evaluation of a run with `trainer.eval_samples=auto` takes further samples, on which its verdicts rest."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from launch import compare, evaluate
from tests.integration.commands import Warm, deterministic, records
from trainer.checkpoint.store import newest_checkpoint
from trainer.report.runs import read_run
from trainer.report.verdicts import rows_of
from trainer.rundir.pairs import read_last_pairs

RUN = (
    *("model=mlp", "model.in_features=6", "model.num_classes=3", "task=classification", "data=arrays"),
    *(
        "ema=constant",
        "ema.decays=[0.5,0.6,0.9]",
        "optimizer.lr=0.0005",
        "logger=none",
        "trainer.num_threads=1",
    ),
    *("trainer.steps=6", "trainer.eval_every=2", "trainer.save_every=3", "trainer.eval_policy=race"),
    *(
        "trainer.global_batch_size=8",
        "trainer.eval_batch_size=512",
        "data.fields={image: x.npy, label: y.npy}",
    ),
    "data.eval_fields={image: more.npy, label: more_y.npy}",
)
AUTO = "trainer.eval_samples=auto"
KEY = "eval/further/samples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    folder = tmp_path_factory.mktemp("auto")
    random = np.random.default_rng(0)
    for name, labels, count in (("x", "y", 90), ("more", "more_y", 5000), ("few", "few_y", 400)):
        label = np.arange(count) % 3
        np.save(folder / labels, label)
        np.save(folder / name, random.normal(size=(count, 6)))  # no signal: nothing to separate
    warm(*RUN, AUTO, "run_dir=run", cwd=folder)
    return folder


def test_values_are_those_of_every_evaluation_and_verdicts_are_of_further_samples(
    folder: Path, warm: Warm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    warm(*RUN, "trainer.eval_samples=256", "run_dir=fixed", cwd=folder)
    own, fixed = records(folder / "run"), records(folder / "fixed")
    (count,) = [int(record.pop(KEY)) for record in own if KEY in record]
    assert 256 < count <= 16 * 256
    assert list(map(deterministic, own)) == list(map(deterministic, fixed))
    assert KEY in records(folder / "run")[-1]

    pairs, out = read_last_pairs(folder / "run" / "pairs.jsonl"), folder / "all.json"
    assert pairs is not None and pairs.further["loss"].count == count
    everything = f"trainer.eval_samples={256 + count}"
    monkeypatch.chdir(folder)
    assert evaluate.main([str(folder / "run"), everything, f"out={out}"]) == 0
    whole = json.loads(out.read_text())["pairs"]["loss"]
    both = [moments.means * moments.count for moments in (pairs.metrics["loss"], pairs.further["loss"])]
    assert sum(both) / (256 + count) == pytest.approx(whole["means"], rel=1e-9)

    rows = {row.weights: row for row in rows_of(read_run(folder / "run"), "loss")}
    live, average = rows["live"].last, rows["0.5"].last
    assert average.gap is not None and average.gap.df == count - 1
    assert average.gap.mean == pytest.approx(live.value - average.value)
    assert (live.value, average.value) == pytest.approx(pairs.further["loss"].means[:2])
    capsys.readouterr()
    assert compare.main([str(folder / "run")]) == 0
    assert f"over {count:,} further samples" in " ".join(capsys.readouterr().out.split())


def test_a_continued_run_takes_the_same_samples(folder: Path, warm: Warm) -> None:
    shutil.copytree(folder / "run", folder / "parts")
    path = newest_checkpoint(folder / "parts" / "checkpoints")
    assert path is not None
    shutil.rmtree(path)
    warm("resume=parts", cwd=folder)
    one, other = folder / "run", folder / "parts"
    assert list(map(deterministic, records(one))) == list(map(deterministic, records(other)))
    assert (one / "pairs.jsonl").read_bytes() == (other / "pairs.jsonl").read_bytes()


def test_ranks_choose_as_one_process_does(folder: Path, warm: Warm) -> None:
    warm(*RUN, AUTO, "run_dir=two", "sharding=fsdp", cwd=folder, ranks=2)
    one, two = (records(folder / name)[-1] for name in ("run", "two"))
    keys = [KEY, "eval/live/loss", "eval/gap/0.5/loss"]
    assert [two[key] for key in keys] == pytest.approx([one[key] for key in keys], rel=0.02)


def test_a_small_split_is_evaluated_as_a_whole_and_a_run_without_averages_is_refused(
    folder: Path, warm: Warm
) -> None:
    warm(*RUN, AUTO, "data.eval_fields={image: few.npy, label: few_y.npy}", "run_dir=few", cwd=folder)
    assert json.loads((folder / "few" / "meta.json").read_text())["num_samples"] == 400
    assert not any(KEY in record for record in records(folder / "few"))
    printed = warm(*RUN[:4], "data=digits", "ema=off", AUTO, "run_dir=none", cwd=folder, code=2)
    assert "trainer.eval_samples: expected a number in a run without averages" in printed
