"""Bad input: one line that names the key or the file, exit code 2, nothing left behind."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from launch import evaluate, merge, posthoc
from tests.integration.commands import Warm, importable_here, trainer
from tests.makers import TINY_GPT
from tests.ranks import RankPool, threads_of_gloo
from trainer.rundir.directory import RunDir

CASES = {
    "unknown key": (["ema.deca=0.9"], "ema.deca"),
    "wrong type": (["ema.decay=abc"], "ema.decay"),
    "float steps": (["trainer.steps=1e3"], "trainer.steps"),
    "decay outside": (["ema.decay=1.5"], "ema.decay"),
    "average of none": (["ema=off", "ema.decay=0.9"], "ema.decay"),
    "bank decay outside": (["ema=bank", "ema.decays=[0.9,-1]"], "ema.decays"),
    "unknown choice": (["model=gtp"], "model"),
    "unknown model argument": (["model.n_layers=2"], "model.n_layers"),
    "primary metric": (
        ["task.primary_metric=los"],
        "task.primary_metric: expected one of loss, accuracy, perplexity, bits_per_byte, got 'los'",
    ),
    "wrong model type": (["model.n_layer=abc"], "model.n_layer"),
    "impossible model": (["model.n_head=3"], "n_head"),
    "foreign target": (["task._target_=os.system"], "task._target_"),
    "missing data": (
        ["data=tokens", "data.train_path=nowhere.bin", "data.eval_path=nowhere.bin"],
        "nowhere.bin",
    ),
    "no resume": (["resume=nowhere"], "nowhere"),
    "multirun": (["-m", "ema.decay=0.9,0.99"], "python -m launch"),
    "optimizer": (["optimizer.name=AdamX"], "optimizer.name"),
    "sharding in one process": (["sharding=hsdp", "sharding.replicate=2"], "sharding.replicate"),
}


COLD = ("unknown key", "impossible model")
"""Found before torch is imported and after it: what Python itself may print is seen in processes of their own."""


@pytest.mark.parametrize("name", CASES)
def test_one_clear_line_exit_code_2_and_no_run_directory(tmp_path: Path, warm: Warm, name: str) -> None:
    overrides, named = CASES[name]
    quick = [o for o in TINY_GPT if not (name == "missing data" and o.startswith("data."))]
    if name in COLD:
        done = trainer(*quick, "trainer.steps=2", *overrides, cwd=tmp_path, check=False)
        assert done.returncode == 2, done.stdout + done.stderr
        printed = done.stdout + done.stderr
    else:
        printed = warm(*quick, "trainer.steps=2", *overrides, cwd=tmp_path, code=2)
    lines = printed.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert named in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_no_checkpoint_can_hold_is_refused_before_it_trains(tmp_path: Path, warm: Warm) -> None:
    (tmp_path / "linked.py").write_text(
        "import torch\n"
        "from models.gpt import GPT\n\n\n"
        "class Linked(torch.nn.Module):\n"
        "    def __init__(self, **arguments: int) -> None:\n"
        "        super().__init__()\n"
        "        self.gpt = GPT(**arguments)\n"
        "        self.register_buffer('links', torch.eye(3).to_sparse())\n\n"
        "    def forward(self, tokens: torch.Tensor) -> torch.Tensor:\n"
        "        return self.gpt(tokens)\n"
    )
    own = ("model._target_=linked.Linked", "allow_targets=[linked]", "ema=off")
    printed = warm(*TINY_GPT, "trainer.steps=1", *own, cwd=tmp_path, code=2, within=importable_here)
    assert printed.startswith("error: model: links has layout torch.sparse_coo")
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ""] == ["linked.py"]


def test_an_existing_run_directory_is_refused_and_left_as_it_was(tmp_path: Path, warm: Warm) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("data")
    printed = warm(*TINY_GPT, "run_dir=run", cwd=tmp_path, code=2)
    assert "run_dir" in printed
    assert len(printed.strip().splitlines()) == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious"]


def test_two_ranks_refuse_what_an_earlier_command_made_and_leave_no_threads(
    tmp_path: Path, warm: Warm, ranks: RankPool
) -> None:
    run = (*TINY_GPT, "sharding=ddp", "trainer.steps=1", "run_dir=run")
    warm(*run, cwd=tmp_path, ranks=2)
    before = (tmp_path / "run" / "meta.json").read_bytes()
    printed = warm(*run, cwd=tmp_path, ranks=2, code=2)
    assert printed.strip().endswith("run exists already; expected a directory to make")
    assert (tmp_path / "run" / "meta.json").read_bytes() == before
    if sys.platform == "linux":
        # A group that only garbage refers to may stop this process for ever when the garbage is collected.
        assert ranks(2, threads_of_gloo) == [1] * 2, "of the group that counts them, and of no earlier one"


@contextmanager
def two_backends(rank: int) -> Iterator[None]:
    """Context in which a rank joins a group with one backend for the CPU and one for GPUs, as a run on GPUs does."""
    join = dist.init_process_group

    def with_both(_: str, **options: Any) -> None:
        join("cpu:gloo,cuda:gloo", **options)

    with patch("torch.distributed.init_process_group", with_both):
        yield


def test_ranks_with_a_second_backend_train_and_refuse_as_others_do(tmp_path: Path, warm: Warm) -> None:
    run = (*TINY_GPT, "sharding=fsdp", "trainer.steps=2", "trainer.save_every=1", "run_dir=run")
    warm(*run, cwd=tmp_path, ranks=2, within=two_backends)
    printed = warm(*run, cwd=tmp_path, ranks=2, within=two_backends, code=2)
    assert len(printed.strip().splitlines()) == 1 and "run exists already" in printed


def without_faults(rank: int) -> AbstractContextManager[Any]:
    return patch("trainer.evaluation.first_forward._primary_faults", return_value=[])


def test_a_primary_metric_of_no_use_is_a_warning_for_an_old_run_and_refused_where_it_is_typed(
    tmp_path: Path, warm: Warm
) -> None:
    fault = "task.primary_metric: expected one of loss, accuracy, perplexity, bits_per_byte, got 'los'"
    typed = "task.primary_metric=los"
    run = (*TINY_GPT, "ema=posthoc", "ema.snapshots=2", "trainer.steps=2", "run_dir=run")
    warm(*run, typed, cwd=tmp_path, within=without_faults)
    assert f"warning: {fault}" in warm("resume=run", "trainer.steps=4", cwd=tmp_path)
    merged = ("run", "profile=linear", "evaluate=run")
    assert f"warning: {fault}" in warm("run", cwd=tmp_path, main=evaluate.main)
    assert f"warning: {fault}" in warm(*merged, "out=m.safetensors", cwd=tmp_path, main=merge.main)
    refusals = (
        warm("run", "decay=0.5", cwd=tmp_path, main=posthoc.main, code=2),  # nothing to compare by
        warm("resume=run", typed, "trainer.steps=6", cwd=tmp_path, code=2),
        warm("run", typed, cwd=tmp_path, main=evaluate.main, code=2),
    )
    assert all(printed.endswith(f"error: {fault}\n") for printed in refusals), refusals


def without_room(rank: int) -> AbstractContextManager[Any]:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return patch("trainer.checkpoint.writing.Writer.write_data", side_effect=full)


def test_a_run_that_is_held_is_refused_and_a_save_that_fails_is_one_line(tmp_path: Path, warm: Warm) -> None:
    warm(*TINY_GPT, "trainer.steps=1", "run_dir=run", cwd=tmp_path)
    before = (tmp_path / "run" / "meta.json").read_bytes()
    with RunDir.open(tmp_path / "run").in_use():
        second = warm("resume=run", "trainer.steps=2", "trainer.timeout_s=2", cwd=tmp_path, code=2)
    assert second.strip().endswith("; wait for it, or stop it")
    assert f"run is in use by process {os.getpid()} on " in second
    assert (tmp_path / "run" / "meta.json").read_bytes() == before

    failed = warm("resume=run", "trainer.steps=2", cwd=tmp_path, code=1, within=without_room)
    (error,) = [line for line in failed.splitlines() if line.startswith("error: ")]
    assert (
        "checkpoints: step 2 cannot be written: No space left on device" in error
        and "Traceback" not in failed
    )


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["trainer.global_batch_size=7"], "trainer.global_batch_size"),
        (["-m", "ema.decay=0.9,0.99"], "python -m launch"),
        (["sharding=none"], "sharding"),
    ],
    ids=["batch size", "multirun", "no sharding"],
)
def test_under_torchrun_only_one_rank_speaks(
    tmp_path: Path, warm: Warm, overrides: list[str], named: str
) -> None:
    arguments = (*TINY_GPT, "sharding=fsdp", *overrides)
    printed = warm(*arguments, cwd=tmp_path, ranks=2, code=2)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert named in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_a_token_that_the_model_cannot_take_is_one_line_with_its_position(tmp_path: Path, warm: Warm) -> None:
    tokens = np.arange(1000) % 90
    tokens.astype(np.uint16).tofile(tmp_path / "train.bin")
    tokens[777] = 100
    tokens.astype(np.uint16).tofile(tmp_path / "eval.bin")
    files = ("data=tokens", "data.train_path=train.bin", "data.eval_path=eval.bin", "data.context=32")
    own = [override for override in TINY_GPT if not override.startswith("data.")]
    printed = warm(*own, *files, "model.vocab_size=100", "run_dir=run", cwd=tmp_path, code=2)
    assert printed == (
        "error: model.vocab_size: expected at least 101, because data.eval_path: eval.bin has the token 100 at"
        " position 777, got 100\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_damaged_image_is_one_line_also_if_a_worker_reads_it(tmp_path: Path) -> None:
    """A picture of both splits is warned about before."""
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for split in ("train", "eval"):
            (tmp_path / split / name).mkdir(parents=True)
        for number in range(8):
            pixels = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{number}.png")
        (tmp_path / "eval" / name / "copy.png").write_bytes(
            (tmp_path / "train" / name / "0.png").read_bytes()
        )
    (tmp_path / "train" / "dog" / "5.png").write_bytes(b"")
    done = trainer(
        *("model=resnet", "model.in_channels=3", "model.image_size=8", "model.num_classes=2"),
        *("task=classification", "data=image_folder", "data.path=train", "data.eval_path=eval"),
        *("data.image_size=8", "trainer.global_batch_size=16", "trainer.steps=3", "logger=none"),
        *("trainer.num_workers=1", "trainer.num_threads=1", "run_dir=run"),
        cwd=tmp_path,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 2, printed
    lines = printed.splitlines()
    (warning,) = [line for line in lines if line.startswith("warning: data.eval_path: ")]
    assert warning.endswith("eval/cat/copy.png is train/cat/0.png")
    assert lines[-1].startswith("error: data.path: train/dog/5.png cannot be read as an image: ")
    assert "Traceback" not in printed


MISFIT = """
from torch import nn

class Spare(nn.Module):
    def __init__(self, backward_fails=False):
        super().__init__()
        self.embed, self.head = nn.Embedding(256, 8), nn.Linear(8, 256)
        self.spare = None if backward_fails else nn.Linear(8, 8)
        self.backward_fails = backward_fails

    def forward(self, tokens):
        hidden = self.embed(tokens)
        if self.backward_fails and self.training:
            hidden.register_hook(lambda gradient: gradient @ gradient)
        return self.head(hidden)
"""


@pytest.mark.parametrize(
    ("sharding", "fails", "line"),
    [
        (
            "ddp",
            False,
            "error: model: the loss gives no gradient to spare.weight, spare.bias, and sharding=ddp",
        ),
        ("fsdp", True, "error: model, task, data: they do not fit together in step 1: RuntimeError: "),
    ],
)
def test_a_model_that_fails_in_its_first_backward_on_all_ranks_is_one_line_and_no_directory(
    tmp_path: Path, warm: Warm, sharding: str, fails: bool, line: str
) -> None:
    (tmp_path / "misfit.py").write_text(MISFIT)
    quick = [override for override in TINY_GPT if not override.startswith("model.")]
    model = ("model=custom", "model._target_=misfit.Spare", f"+model.backward_fails={fails}")
    more = ("run_dir=run", "trainer.steps=2", f"sharding={sharding}")
    printed = warm(*quick, *model, *more, cwd=tmp_path, ranks=2, code=2, within=importable_here)
    (error,) = [found for found in printed.splitlines() if found.startswith("error: ")]
    assert error.startswith(line) and "Traceback" not in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return 1.5 if t == 4 else 0.5", "decay rule my_rule.beta: expected beta in [0, 1] at t=4, got 1.5"),
        ("return None", "TypeError"),
        ("return 0.5 if t != 7 else 1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_rule_of_the_user_that_fails_is_one_line_before_there_is_a_directory(
    tmp_path: Path, warm: Warm, body: str, expected: str
) -> None:
    (tmp_path / "my_rule.py").write_text(f"def beta(t, config):\n    {body}\n")
    own = ("trainer.steps=10", "ema.rule=my_rule.beta", "run_dir=run", "allow_targets=[my_rule.]")
    printed = warm(*TINY_GPT, *own, cwd=tmp_path, code=2, within=importable_here)
    assert printed.startswith("error: ema.rule: ") and expected in printed and printed.count("\n") == 1
    assert not (tmp_path / "run").exists()
