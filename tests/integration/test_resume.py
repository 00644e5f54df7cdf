"""Interrupted and carried on equals uninterrupted, bit for bit."""

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from tests.integration.commands import (
    Warm,
    assert_equal_runs,
    deterministic,
    interrupt_at,
    records,
    saved,
)
from tests.makers import TINY_GPT

STEPS = 24
RUN = (
    *TINY_GPT,
    "ema=bank",
    "ema.decays=[0.9,0.99]",
    "ema.start_iter=6",
    "ema.update_every=2",
    f"trainer.steps={STEPS}",
    "trainer.log_every=1",
    "trainer.eval_every=8",
    "schedule=wsd",
)


@pytest.mark.parametrize("processes", [1, 2], ids=["one-process", "fsdp2"])
def test_sigterm_at_a_random_step_and_resume_equals_uninterrupted(
    tmp_path: Path, warm: Warm, processes: int
) -> None:
    """Under torchrun the signal goes to torchrun alone; one process gets it together with its data workers."""
    run = (*RUN, "sharding=fsdp") if processes > 1 else RUN
    warm(*run, "run_dir=whole", cwd=tmp_path, ranks=processes)
    step = random.randrange(2, STEPS // 2)  # as many again, of 10 ms each, for the signal to arrive
    code, printed = interrupt_at(
        step,
        *run,
        *([] if processes > 1 else ["trainer.num_workers=2"]),
        f"run_dir={tmp_path / 'parts'}",
        cwd=tmp_path,
        ranks=processes,
        whole_group=processes == 1,
    )
    # torchrun answers a signal with a code of its own; the trainer's is 75.
    assert code == 75 if processes == 1 else code != 0, printed
    assert "resume=" in printed, printed
    reached = records(tmp_path / "parts")[-1]["train/step"]
    assert step <= reached < STEPS, f"asked for {step}, stopped at {reached}"
    warm("resume=parts", "trainer.num_workers=0", cwd=tmp_path, ranks=processes)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_an_interrupted_resume_goes_on_as_it_was_last_asked_to(tmp_path: Path, warm: Warm) -> None:
    warm(*RUN, "trainer.steps=2", "run_dir=run", cwd=tmp_path)
    longer = (f"resume={tmp_path / 'run'}", "trainer.steps=400", "optimizer.lr=1e-4")
    code, printed = interrupt_at(5, *longer, cwd=tmp_path)
    assert code == 75, printed
    again = printed.rpartition("continue with:\n")[2].partition("-m trainer ")[2].splitlines()[0].split()
    reached = records(tmp_path / "run")[-1]["train/step"]
    refused = warm(*again, f"trainer.steps={reached - 1}", cwd=tmp_path, code=2)
    assert f"trainer.steps: expected at least the {reached} steps done" in refused
    warm(*again, f"trainer.steps={reached + 2}", "schedule=constant", cwd=tmp_path)
    assert [record["train/lr"] for record in records(tmp_path / "run")][-2:] == [1e-4, 1e-4]


def test_a_run_killed_before_its_first_checkpoint_starts_again_in_its_directory(
    tmp_path: Path, warm: Warm
) -> None:
    warm(*RUN, "trainer.steps=4", "run_dir=run", cwd=tmp_path)
    expected = [deterministic(record) for record in records(tmp_path / "run")]
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        (checkpoint / "COMMIT.json").unlink()
    warm("resume=run", cwd=tmp_path)
    assert [deterministic(record) for record in records(tmp_path / "run")] == expected


def test_resume_with_more_steps_and_a_new_average_starts_that_one_from_the_loaded_weights(
    tmp_path: Path, warm: Warm
) -> None:
    warm(*TINY_GPT, "ema.decay=0.9", "trainer.steps=4", "run_dir=run", cwd=tmp_path)
    changed = ["trainer.steps=8", "ema.decays=[0.9,0.99]", "trainer.eval_samples=6"]
    printed = warm("resume=run", *changed, cwd=tmp_path)
    assert "ema/0.99 is not in the checkpoint" in printed
    tensors, values = saved(tmp_path / "run")
    assert values["progress"]["step"] == 8  # type: ignore[index]
    counters = tensors["ema/0.9/_ema.counters"], tensors["ema/0.99/_ema.counters"]
    assert int(counters[0][1]) == int(counters[1][1]) + 4  # updates since each one's start
    # Reports count by the samples of the last evaluation.
    assert json.loads((tmp_path / "run" / "meta.json").read_text())["num_samples"] == 6


def test_a_run_goes_on_at_any_other_number_of_ranks_and_sharding_with_the_same_batches(
    tmp_path: Path, warm: Warm
) -> None:
    """2 -> 3 -> 1 -> 4 ranks against one process: the same global batches, so the same numbers to rounding.

    Another sample in one batch would change that step's loss by far more than the tolerance; so would an average or an
    optimizer state that did not come along.
    """
    run = (*RUN, "trainer.global_batch_size=12", "trainer.steps=16", "schedule=constant")
    warm(*run, "run_dir=whole", cwd=tmp_path)
    warm(*run, "trainer.steps=4", "sharding=fsdp", "run_dir=parts", cwd=tmp_path, ranks=2)
    warm("resume=parts", "trainer.steps=8", "sharding=ddp", cwd=tmp_path, ranks=3)
    warm("resume=parts", "trainer.steps=12", "sharding=none", cwd=tmp_path)
    last_session = ("trainer.steps=16", "sharding=hsdp", "sharding.replicate=2")
    warm("resume=parts", *last_session, cwd=tmp_path, ranks=4)
    whole, parts = ([deterministic(r) for r in records(tmp_path / name)] for name in ("whole", "parts"))
    assert [r["train/step"] for r in parts] == [r["train/step"] for r in whole] == list(range(1, 17))
    assert [r["train/loss"] for r in parts] == pytest.approx([r["train/loss"] for r in whole], abs=1e-4)
    ends = {key: value for key, value in whole[-1].items() if key.startswith("eval/") and "/gap/" not in key}
    assert {"eval/live/loss", "eval/ema/0.9/loss", "eval/ema/0.99/loss"} <= ends.keys()
    assert {key: parts[-1][key] for key in ends} == pytest.approx(ends, abs=1e-4)
    progress = [saved(tmp_path / name)[1]["progress"] for name in ("whole", "parts")]
    assert progress[0] == progress[1]


def test_a_finished_run_is_left_as_it_is_and_a_missing_report_is_written(tmp_path: Path, warm: Warm) -> None:
    warm(*RUN, "trainer.steps=2", "run_dir=run", cwd=tmp_path, report=True)
    run = tmp_path / "run"

    def content() -> dict[Path, tuple[bytes, int]]:
        return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.rglob("*") if p.is_file()}

    before = content()
    for more in ({"ranks": 1}, {"ranks": 2}):
        sharding = f"sharding={'ddp' if more['ranks'] == 2 else 'none'}"
        printed = warm("resume=run", sharding, cwd=tmp_path, report=True, **more)
        (line,) = printed.splitlines()
        assert line.startswith(f"{run}: all 2 steps are done") and "trainer.steps=4" in line
        assert content() == before
    refused = warm("resume=run", "init_from=other.safetensors", cwd=tmp_path, code=2)
    assert "error: init_from: " in refused and "continues from its checkpoint" in refused
    note, _ = warm("resume=run", "optimizer.lr=0.5", "seed=3", cwd=tmp_path).splitlines()
    assert note == "note: no step is left, so these have no effect: optimizer.lr=0.5 seed=3"
    assert content() == before

    (run / "report" / "index.html").unlink()  # as if killed while the report was written
    warm("resume=run", cwd=tmp_path, report=True)
    assert (run / "report" / "index.html").is_file()
    os.utime(run / "report" / "index.html", ns=(0, 0))  # the report of an earlier session
    warm("resume=run", cwd=tmp_path, report=True)
    assert (run / "report" / "index.html").stat().st_mtime_ns > 0
    warm("resume=run", "trainer.steps=3", cwd=tmp_path)
    assert records(run)[-1]["train/step"] == 3


@contextmanager
def six_minutes_per_look(rank: int) -> Iterator[None]:
    """The clock of rank 0 moves on by 360 s at each look, that of the other rank stands still."""
    seconds = count(0, 360 if rank == 0 else 0)
    with patch("trainer.distributed.stop.time", SimpleNamespace(monotonic=lambda: next(seconds))):
        yield


def test_by_default_all_ranks_save_by_the_clock_of_rank_0_and_no_number_changes(
    tmp_path: Path, warm: Warm
) -> None:
    run = (*RUN, "sharding=fsdp", "trainer.steps=8", "trainer.keep_checkpoints=9")
    warm(*run, "run_dir=timed", cwd=tmp_path, ranks=2, within=six_minutes_per_look)
    warm(*run, "trainer.save_every=0", "run_dir=never", cwd=tmp_path, ranks=2)
    steps = [
        sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir())
        for name in ("timed", "never")
    ]
    assert steps[1] == ["step-00000008"]
    assert len(steps[0]) > 2 and steps[0][-1:] == steps[1]
    assert_equal_runs(tmp_path / "timed", tmp_path / "never")


def test_a_run_whose_last_session_skipped_all_its_steps_fails_again_when_it_is_resumed(
    tmp_path: Path, warm: Warm
) -> None:
    """A sweep that resumes it would count it as done."""
    warm(*RUN, "trainer.steps=1", "run_dir=run", "optimizer.lr=1e30", "schedule=constant", cwd=tmp_path)
    warm("resume=run", "trainer.steps=2", cwd=tmp_path, report=True, code=1)
    printed = warm("resume=run", cwd=tmp_path, report=True, code=1)
    assert "all 2 steps are done" in printed and "the last session skipped all its steps" in printed
    (tmp_path / "run" / "report" / "index.html").unlink()
    printed = warm("resume=run", cwd=tmp_path, report=True, code=1)
    assert "exit code 1: the last session skipped all its steps" in printed


def own_folder(parent: Path, rank: int) -> "chdir[Path]":
    return chdir(parent / str(rank))


def test_ranks_that_see_another_state_of_the_file_system_agree_whether_the_run_is_done(
    tmp_path: Path, warm: Warm
) -> None:
    for folder in ("0", "1"):
        (tmp_path / folder).mkdir()
    warm(*RUN, "trainer.steps=1", "run_dir=run", cwd=tmp_path / "0", report=True)
    shutil.copytree(tmp_path / "0" / "run", tmp_path / "1" / "run")
    (tmp_path / "1" / "run" / "report" / "index.html").unlink()  # rank 1 does not see it yet
    printed = warm(
        "resume=run",
        "sharding=ddp",
        "trainer.timeout_s=20",
        cwd=tmp_path,
        ranks=2,
        report=True,
        within=partial(own_folder, tmp_path),
    )
    assert "all 1 steps are done" in printed


@pytest.mark.parametrize("processes", [1, 2], ids=["one-process", "fsdp2"])
def test_muon_with_adamw_in_float16_resumes_bit_for_bit(tmp_path: Path, warm: Warm, processes: int) -> None:
    groups = "{last: {params: ['blocks.1.*'], ndim: 1, lr_factor: 0.5}}"
    run = (*RUN, "optimizer=muon", f"+optimizer.groups={groups}", "trainer.steps=6", "trainer.save_every=3")
    run += ("sharding.param_dtype=float16",)
    run += ("sharding=fsdp",) if processes == 2 else ()
    warm(*run, "run_dir=whole", "trainer.keep_checkpoints=2", cwd=tmp_path, ranks=processes)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoints/step-00000006")
    warm("resume=parts", cwd=tmp_path, ranks=processes)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")
    assert records(tmp_path / "parts")[-1]["train/loss_scale"] == 2.0**16
    assert records(tmp_path / "parts")[-1]["train/skipped_steps"] == 0
