"""`python -m launch.evaluate`: the very numbers of the run, and the right ones on other data.

What the run logged is the reference where nothing is overridden. On other data the losses are computed here, from the
tensors of the checkpoint, with the bare model and one cross-entropy over the text.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_model

from launch import export
from launch.evaluate import main
from models.gpt import GPT
from tests.integration.commands import REPOSITORY, Warm, command, environment, records, run_to_end, trainer
from tests.makers import TINY_GPT
from tests.ranks import threads_of_gloo
from trainer.build import build_evaluated
from trainer.checkpoint.store import load_checkpoint, stored_tensors
from trainer.config.averages import settle_averages
from trainer.config.compose import compose, to_config
from trainer.config.frozen import thaw
from trainer.distributed.processes import join, leave
from trainer.run import run as train
from trainer.rundir.directory import RunDir

RUN = (
    *TINY_GPT,
    "ema=constant",
    "trainer.steps=8",
    "trainer.log_every=4",
    "trainer.eval_every=4",
    "trainer.save_every=4",
)
AVERAGES = (
    "ema.averages={fast:{decay:0.9},half:{decay:0.5,dtype:bfloat16},part:{decay:0.9,include:['blocks.*']},"
    "own:{rule:my_rules.mean},late:{decay:0.9,start_iter:1000}}"
)
CONTEXT = 32


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process whose averages differ in dtype, coverage, rule (the user's own) and start."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "my_rules.py").write_text("def mean(t, config):\n    return 1 - 1 / (t + 1)\n")
    trainer(*RUN, AVERAGES, "run_dir=run", cwd=folder)
    return folder / "run"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    """A run of two ranks whose averages are kept by shard, and whole."""
    folder = tmp_path_factory.mktemp("two")
    averages = "ema.averages={fast:{decay:0.9},whole:{decay:0.9,mode:full_tensor}}"
    warm(*RUN, averages, "sharding=fsdp", "run_dir=run", cwd=folder, ranks=2)
    return folder / "run"


def evaluate(run_dir: Path, out: Path, *arguments: str) -> dict[str, Any]:
    """The command in this process: what it wrote."""
    assert main([str(run_dir), *arguments, f"out={out}"]) == 0
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def logged(run_dir: Path, step: int = 8) -> dict[str, float]:
    """The evaluation metrics that the run recorded at a step."""
    (record,) = [record for record in records(run_dir) if record["train/step"] == step]
    return {key: number for key, number in record.items() if key.startswith("eval/")}


def means(metrics: dict[str, float]) -> dict[str, float]:
    return {key: number for key, number in metrics.items() if not key.startswith("eval/gap/")}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_without_overrides_it_prints_and_writes_the_very_numbers_of_the_run_and_changes_nothing_else(
    one: Path,
) -> None:
    before = files(one)
    done = run_to_end(command("run", module="launch.evaluate"), cwd=one.parent)
    after = files(one)
    (made,) = after.keys() - before.keys()
    assert {name: after[name] for name in before} == before
    assert made.startswith("evaluations/2") and "_step-8_" in made and made.endswith(".json")
    result = json.loads(after[made])
    assert result["metrics"] == logged(one)
    assert {"eval/live/loss", "eval/ema/part/loss", "eval/gap/own/loss_se"} <= result["metrics"].keys()
    assert result["weights"] == ["live", "ema/fast", "ema/half", "ema/part", "ema/own"]
    assert result["not_started"] == ["ema/late"]
    meta = json.loads(before["meta.json"])
    assert (result["step"], result["num_samples"], result["world_size"]) == (8, 16, 1)
    assert (result["config_sha256"], result["overrides"]) == (meta["config_sha256"], [])
    assert result["versions"] == meta["versions"]
    assert "ema/late had not started at step 8: left out" in done.stdout
    assert "EMA fast" in done.stdout and f"written: run/{made}" in done.stdout
    assert f"{result['metrics']['eval/live/loss']:.4f}" in done.stdout


def test_two_ranks_repeat_their_own_numbers_bit_for_bit(two: Path, tmp_path: Path, warm: Warm) -> None:
    out = f"out={tmp_path / 'new' / 'x.json'}"
    printed = warm(str(two), out, cwd=tmp_path, ranks=2, main=main)
    result = json.loads((tmp_path / "new" / "x.json").read_text())
    assert result["metrics"] == logged(two)
    assert (result["world_size"], result["sharding"]) == (2, "fsdp")
    # One rank prints: the table of the loss, and a line for each other metric.
    for line in ("run: loss", "other metrics", "[> ]*accuracy .*"):
        assert len(re.findall(rf"^{line}$", printed, re.MULTILINE)) == 1, line
    assert not (two / "evaluations").exists()


def test_any_ranks_and_sharding_agree_to_1e_4_with_those_that_wrote_the_checkpoint(
    one: Path, two: Path, tmp_path: Path, warm: Warm
) -> None:
    alone = evaluate(two, tmp_path / "alone.json")
    unsharded = evaluate(two, tmp_path / "unsharded.json", "sharding=none", "trainer.eval_batch_size=3")
    for result in (alone, unsharded):
        assert means(result["metrics"]) == pytest.approx(means(logged(two)), abs=1e-4)
    warm(str(one), "sharding=fsdp", "out=x.json", cwd=tmp_path, ranks=2, main=main)
    spread = json.loads((tmp_path / "x.json").read_text())
    assert means(spread["metrics"]) == pytest.approx(means(logged(one)), abs=1e-4)
    # Averages and live weights differ by far more, so weights in the wrong place are seen.
    losses = [number for key, number in means(spread["metrics"]).items() if key.endswith("/loss")]
    assert min(abs(a - b) for a in losses for b in losses if a is not b) > 1e-3


def stored(run_dir: Path, step: int, prefix: str) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint below `prefix`."""
    path = run_dir / "checkpoints" / f"step-{step:08d}"
    found = {
        key: torch.empty(like.shape, dtype=like.dtype)
        for key, like in stored_tensors(path).items()
        if key.startswith(prefix) and "/_ema." not in key
    }
    load_checkpoint(path, found)
    return {key.removeprefix(prefix): tensor for key, tensor in found.items()}


def loss_by_hand(weights: dict[str, torch.Tensor], text: bytes) -> float:
    """Cross-entropy of each byte given at most 32 before it, in nats, by the definition of `data=text_files`."""
    model = GPT(n_layer=2, n_head=2, n_embd=32, context=CONTEXT, vocab_size=256)
    model.load_state_dict(weights)
    tokens = torch.tensor(list(text + b"\0"))
    count = (len(tokens) - 1) // CONTEXT
    windows = torch.stack([tokens[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in range(count)])
    with torch.no_grad():
        logits = model.eval()(windows[:, :-1]).double()
    return float(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def test_other_data_and_another_step_give_the_losses_computed_by_hand(one: Path, tmp_path: Path) -> None:
    text = bytes(range(32, 127)) * 20
    (tmp_path / "new.txt").write_bytes(text)
    result = evaluate(
        one,
        tmp_path / "x.json",
        "step=4",
        "data=text_files",
        f"data.paths=[{tmp_path / 'new.txt'}]",
        f"data.context={CONTEXT}",
        "data.eval_fraction=0.5",
        "trainer.eval_samples=0",
    )
    tail = text[len(text) // 2 :]
    live = stored(one, 4, "model/")
    assert result["num_samples"] == len(tail) // CONTEXT
    assert result["metrics"]["eval/live/loss"] == pytest.approx(loss_by_hand(live, tail), abs=1e-5)
    fast = {name: tensor.float() for name, tensor in stored(one, 4, "ema/fast/").items()}
    assert result["metrics"]["eval/ema/fast/loss"] == pytest.approx(loss_by_hand(fast, tail), abs=1e-5)
    part = live | stored(one, 4, "ema/part/")
    assert result["metrics"]["eval/ema/part/loss"] == pytest.approx(loss_by_hand(part, tail), abs=1e-5)
    assert result["metrics"]["eval/live/loss"] != pytest.approx(logged(one, 4)["eval/live/loss"], abs=0.01)
    assert result["step"] == 4
    assert "data=text_files" in result["overrides"]


def test_what_is_odd_about_the_data_is_printed(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tokens.npy"
    np.save(path, np.arange(1000, dtype=np.uint16) % 256)
    options = ["data=tokens", f"data.train_path={path}", f"data.eval_path={path}", f"data.context={CONTEXT}"]
    evaluate(one, tmp_path / "x.json", *options, "data.vocab_size=256", "weights=live")
    assert f"warning: data.eval_path: {path} is the training file" in capsys.readouterr().out


METRICS = """
def confidence(model, batch, random, floor: float = 0.0):
    return model(batch["tokens"][:, :-1]).softmax(-1).amax(-1).mean(1).clamp(min=floor)

def one_number(model, batch, random):
    return model(batch["tokens"][:, :-1]).mean()
"""


def test_a_metric_of_ones_own_is_judged_beside_the_tasks(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics_of_mine.py").write_text(METRICS)
    monkeypatch.syspath_prepend(tmp_path)
    mine = "{_target_:metrics_of_mine.confidence,unit:probability,higher_is_better:true}"
    result = evaluate(one, tmp_path / "x.json", f"+metrics.sure={mine}", "weights=live,ema/fast")
    found = result["metrics"]
    assert {key: found[key] for key in found if "sure" not in key} == {
        key: number for key, number in logged(one).items() if key in found
    }
    live, fast, gap = (found[f"eval/{name}/sure"] for name in ("live", "ema/fast", "gap/fast"))
    assert 1 / 256 < fast < live < 1
    assert gap == pytest.approx(live - fast, abs=1e-9)
    assert 0 < found["eval/gap/fast/sure_se"] < abs(gap)
    assert result["higher_is_better"] == ["accuracy", "sure"]
    assert result["metric_units"]["sure"] == "probability"
    printed = capsys.readouterr().out
    assert re.search(r"^[> ]*sure \(probability\) +higher ", printed, re.MULTILINE)
    floored = evaluate(one, tmp_path / "y.json", f"+metrics.sure={mine}", "+metrics.sure.floor=0.5")
    assert floored["metrics"]["eval/live/sure"] == 0.5
    assert main([str(one), "+metrics.bad._target_=metrics_of_mine.one_number"]) == 2
    assert "error: metrics.bad: expected a tensor of shape (4,), got ()" in capsys.readouterr().err


def test_patterns_choose_weights_and_without_live_there_are_no_gaps(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(one, tmp_path / "x.json", "weights=ema/*a*")
    assert result["weights"] == ["ema/fast", "ema/half", "ema/part"]
    assert result["not_started"] == ["ema/late"]
    expected = logged(one)
    assert result["metrics"] == {key: expected[key] for key in result["metrics"]}
    assert {key.split("/")[1] for key in result["metrics"]} == {"ema"}
    printed = capsys.readouterr().out
    assert "live  " not in printed
    assert " ± 0" not in printed


REFUSED = {
    "a step without checkpoint": (["step=5"], " has no checkpoint of step 5; checkpoints exist for steps 4, 8"),
    "unknown weights": (["weights=live,ema/fats"], "weights: expected one of live, ema/fast, ema/half,"),
    "late weights alone": (["weights=ema/late"], "weights: none of ema/late had started at step 8"),
    "another model": (["model.n_layer=3"], "model.n_layer: an evaluation cannot change it; expected step, weights"),
    "data of another vocabulary": (["data.context=64"], "data.context: expected at most model.context=32, got 64"),
    "an existing file": (["out=there"], "there exists already"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing(
    one: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("precious")
    before = files(one)
    arguments, expected = REFUSED[name]
    assert main([str(one), *arguments]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and expected in line
    assert files(one) == before
    assert (tmp_path / "there").read_text() == "precious"


def test_under_torchrun_only_one_rank_speaks(one: Path, tmp_path: Path, warm: Warm) -> None:
    printed = warm(str(one), "step=5", cwd=tmp_path, ranks=2, code=2, main=main)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "steps 4, 8" in errors[0]


def test_a_damaged_checkpoint_is_refused_by_name(
    tmp_path: Path, one: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    for name, content in files(one).items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    (file,) = (copy / "checkpoints" / "step-00000008").glob("*.distcp")
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    assert main([str(copy)]) == 2
    # Neither the key of another command nor its advice: nothing is resumed.
    assert capsys.readouterr().err == f"error: {file} is damaged (its checksum is not the marker's)\n"
    assert main([str(copy), "step=4", f"out={tmp_path / 'x.json'}"]) == 0


def test_best_is_of_the_chosen_weights_and_says_which_step_was_better(
    tmp_path: Path, one: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(one, copy := tmp_path / "copy")
    with (copy / "metrics.jsonl").open("a") as file:  # the later record of a step wins
        for step, live, fast in ((4, 0.5, 9.0), (6, 0.25, 9.0), (8, 1.0, 8.0)):
            file.write(
                json.dumps({"train/step": step, "eval/live/loss": live, "eval/ema/fast/loss": fast}) + "\n"
            )
    assert evaluate(copy, tmp_path / "fast.json", "step=best", "weights=ema/fast")["step"] == 8
    assert "note:" not in capsys.readouterr().out
    assert evaluate(copy, tmp_path / "live.json", "step=best", "weights=live,ema/fast")["step"] == 4
    assert capsys.readouterr().out.startswith(
        "note: step=best: step 4 (loss 0.5, live) is the best with a checkpoint; step 6 (loss 0.25, live) was better"
        " but has none\n"
    )


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed on Linux only")
def test_no_thread_of_the_process_group_is_left_to_meet_the_end_of_python(two: Path, tmp_path: Path) -> None:
    """One that still held a tensor aborted the process at its exit, now and then on a busy machine."""
    before = threads_of_gloo()
    evaluate(two, tmp_path / "x.json")
    assert threads_of_gloo() <= before


def wrong(model: torch.nn.Module, batch: dict[str, torch.Tensor], random: Any) -> torch.Tensor:
    """A metric of the user's: 1 where the first choice is wrong."""
    return (model(batch["image"]).argmax(-1) != batch["label"]).float()


def shipped(folder: Path) -> float:
    """The loss of the exported average, in the model's own class, on the samples of the run's evaluations."""
    out = folder / "average.safetensors"
    assert export.main([str(folder / "run"), "weights=ema/0.5", f"out={out}", "allow_targets=[tests.]"]) == 0
    config = to_config(thaw(RunDir.open(folder / "run").latest_config()))
    processes = join(config.trainer)
    try:
        parts = build_evaluated(config, settle_averages(config), processes, ["tests."])
        load_model(parts.network.module, out)
        return float(parts.evaluation.evaluate(parts.network)["loss"].mean())
    finally:
        leave()


def test_batchnorm_is_re_estimated_and_own_metrics_are_repeated_as_in_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Statistics of an average come from training samples: they are the same ones in the evaluation."""
    overrides: Sequence[str] = (
        "experiment=digits_noise",
        "model=resnet",
        "model.widths=[4,8]",
        "model.blocks_per_stage=1",
        "ema.decays=[0.5]",
        "ema.batchnorm_batches=2",
        "trainer.steps=6",
        "trainer.eval_samples=32",
        "trainer.num_threads=1",
        "logger=none",
        f"run_dir={tmp_path / 'run'}",
        "+metrics.wrong._target_=tests.integration.test_evaluate.wrong",
        "+metrics.wrong.unit=share",
    )
    assert train(*compose(overrides)) == 0
    assert main([str(tmp_path / "run")]) == 2
    assert "metrics.wrong._target_: not allowed" in capsys.readouterr().err
    allowed = "allow_targets=[tests.]"
    result = evaluate(tmp_path / "run", tmp_path / "x.json", allowed)
    assert result["metrics"] == logged(tmp_path / "run", 6)
    for weights in ("live", "ema/0.5"):  # a metric of the run's own configuration, trusted by name only
        right, wrong_ones = (result["metrics"][f"eval/{weights}/{name}"] for name in ("accuracy", "wrong"))
        assert right + wrong_ones == 1
    assert shipped(tmp_path) == pytest.approx(result["metrics"]["eval/ema/0.5/loss"], rel=1e-6)
    assert json.loads((tmp_path / "run" / "meta.json").read_text())["metric_units"]["wrong"] == "share"
    more = evaluate(
        tmp_path / "run", tmp_path / "y.json", allowed, "trainer.eval_samples=0", "data.eval_fraction=0.5"
    )
    assert more["num_samples"] == 898
    # Of what was typed, the title has what changes the numbers.
    assert "run: loss trainer.eval_samples=0 data.eval_fraction=0.5\n" in capsys.readouterr().out


def test_help_and_refusals_of_the_command_line_do_not_wait_for_torch() -> None:
    code = "import sys, launch.evaluate; sys.exit(bool({'torch', 'wandb', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), cwd=REPOSITORY).returncode == 0
