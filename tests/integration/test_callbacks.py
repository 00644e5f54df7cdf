"""A user's own callbacks, named on the command line."""

import json
from pathlib import Path

from tests.integration.commands import Warm, importable_here
from tests.makers import TINY_GPT

CALLBACK = """
import json
import torch.distributed as dist

class Diary:
    every = 2

    def __init__(self, name: str):
        self.name = name

    def _write(self, run, event, **facts):
        rank = dist.get_rank() if dist.is_initialized() else 0
        if dist.is_initialized():
            dist.barrier()  # every rank is here
        facts |= {"event": event, "step": run.step, "samples": run.samples, "lr": run.lr}
        with (run.run_dir / f"{self.name}{rank}.jsonl").open("a") as file:
            file.write(json.dumps(facts) + "\\n")

    def after_step(self, run):
        self._write(run, "step")

    def after_evaluation(self, run):
        (average,) = run.averages
        with run.averages[average].swapped_into(run.model):
            pass
        self._write(run, "evaluation", loss=run.metrics[f"eval/ema/{average}/loss"])

    def after_checkpoint(self, run, step, path):
        self._write(run, "checkpoint", of=step, exists=(path / "COMMIT.json").exists())

    def at_end(self, run):
        self._write(run, "end", page=(run.run_dir / "report" / "index.html").exists())

class Broken:
    def after_step(self, run):
        if run.step == 2:
            raise ValueError("no room")

class Setting:
    def after_step(self, run):
        run.step = 7

def nothing():
    return object()
"""
SIZE = ("trainer.steps=4", "trainer.log_every=1", "trainer.eval_every=4", "trainer.save_every=2")
DIARY = ("+callbacks.diary._target_=my_calls.Diary", "+callbacks.diary.name=diary")


def write_callbacks(folder: Path) -> None:
    (folder / "my_calls.py").write_text(CALLBACK)


def events(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_callbacks_see_steps_evaluations_checkpoints_and_the_end_on_every_rank(
    tmp_path: Path, warm: Warm
) -> None:
    write_callbacks(tmp_path)
    chosen = (*TINY_GPT, *SIZE, *DIARY, "run_dir=run")
    warm(*chosen, "sharding=fsdp", cwd=tmp_path, within=importable_here, ranks=2, report=True)
    first = events(tmp_path / "run" / "diary0.jsonl")
    kinds = [(event["event"], event["step"]) for event in first if event["event"] != "checkpoint"]
    assert kinds == [("step", 2), ("step", 4), ("evaluation", 4), ("end", 4)]
    saved = [event for event in first if event["event"] == "checkpoint"]
    assert [event["of"] for event in saved] == [2, 4] and all(event["exists"] for event in saved)
    assert first[-1]["samples"] == 32 and first[-1]["page"]
    second = events(tmp_path / "run" / "diary1.jsonl")
    assert [{**event, "loss": 0} for event in second] == [{**event, "loss": 0} for event in first]

    refused = warm("resume=run", "trainer.steps=6", cwd=tmp_path, within=importable_here, code=2)
    assert "callbacks.diary._target_" in refused and "allow_targets=[my_calls.Diary]" in refused


def test_a_callback_that_fails_ends_the_run_with_its_name(tmp_path: Path, warm: Warm) -> None:
    write_callbacks(tmp_path)
    chosen = (*TINY_GPT, *SIZE)
    said = warm(
        *chosen,
        "+callbacks.room._target_=my_calls.Broken",
        "run_dir=a",
        cwd=tmp_path,
        within=importable_here,
        code=2,
    )
    assert "callbacks.room: after_step failed at step 2: ValueError: no room" in said
    said = warm(
        *chosen,
        "+callbacks.set._target_=my_calls.Setting",
        "run_dir=b",
        cwd=tmp_path,
        within=importable_here,
        code=2,
    )
    assert "callbacks.set: after_step failed at step 1: AttributeError" in said
    said = warm(
        *chosen,
        "+callbacks.no._target_=my_calls.nothing",
        "run_dir=c",
        cwd=tmp_path,
        within=importable_here,
        code=2,
    )
    assert "callbacks.no: expected an object with a method after_step" in said
    assert not (tmp_path / "c").exists()
