"""How long a save stops the training, beside `torch.save` of the same tensors.

    python -m tests.benchmarks.bench_save [--rounds 5] [--layers 12] [--width 768] [--folder /tmp] [--json PATH]

The state is that of a GPT of 124 M parameters with AdamW and three averages, 2.8 GiB. A round saves it three times:
with `torch.save` and `fsync` into a new file, which makes it as durable as a checkpoint is; synchronously; and
asynchronously, where the time until the save returns and the wait before the next optimizer step count. Before each of
them the disk has nothing left to write. The ratios are medians of those within a round.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from trainer.build import build, build_evaluated, make_run
from trainer.checkpoint.saving import Saver, Ways, state_of
from trainer.config.averages import settle_averages
from trainer.config.compose import compose, to_config
from trainer.config.validate import validate
from trainer.distributed.processes import join, leave
from trainer.loop.fit import Run, train_step

TARGETS = {"asynchronous / synchronous": 0.05, "synchronous / torch.save": 1.1}
"""Largest ratios that are aimed at."""


def make(layers: int, width: int) -> Run:
    """A run of the quickstart's data with a larger model, after one step."""
    typed = [
        "experiment=quickstart",
        f"model.n_layer={layers}",
        f"model.n_embd={width}",
        f"model.n_head={width // 64}",
        "model.vocab_size=50257",
        "trainer.global_batch_size=8",
        "ema=bank",
        "ema.decays=[0.9,0.99,0.999]",
        "logger=none",
    ]
    config = to_config(compose(typed)[0])
    validate(config, 1)
    averages = settle_averages(config)
    parts = build(config, averages, build_evaluated(config, averages, join(config.trainer), []), [])
    run = make_run(config, parts)
    step(run)
    return run


def step(run: Run) -> float:
    """Do one step; return seconds."""
    begin = time.perf_counter()
    train_step(run, run.step + 1)
    run.step += 1
    return time.perf_counter() - begin


class Sides:
    """The ways to save, each as a function that returns the seconds for which the training stood still."""

    def __init__(self, run: Run, folder: Path) -> None:
        self._run, self._folder = run, folder
        self._at_once = Saver(folder / "at_once", Ways(print), keep=1)
        self._beside = Saver(folder / "beside", Ways(print, background=True), keep=1)
        self.step_beside: list[float] = []
        """Seconds of the steps that a save went on beside, without the wait."""

    def torch_save(self) -> float:
        begin = time.perf_counter()
        new = self._folder / "state.pt.new"
        with new.open("wb") as file:
            torch.save(state_of(self._run), file)
            file.flush()
            os.fsync(file.fileno())
        took = time.perf_counter() - begin
        new.replace(self._folder / "state.pt")
        return took

    def synchronous(self) -> float:
        begin = time.perf_counter()
        self._at_once.save(self._run, last=False)
        took = time.perf_counter() - begin
        self._at_once.settle()
        return took

    def asynchronous(self) -> float:
        waited = 0.0

        def wait() -> None:
            nonlocal waited
            begin = time.perf_counter()
            self._beside.before_change()
            waited += time.perf_counter() - begin

        begin = time.perf_counter()
        self._beside.save(self._run, last=False)
        took = time.perf_counter() - begin
        self._run.before_change = [wait]
        self.step_beside.append(step(self._run) - waited)
        self._run.before_change = []
        self._beside.settle()
        return took + waited


def measure(run: Run, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each way and round, of a step alone, and of a step beside a save."""
    sides = Sides(run, folder)
    ways: dict[str, Callable[[], float]] = {
        "torch.save": sides.torch_save,
        "synchronous": sides.synchronous,
        "asynchronous": sides.asynchronous,
        "step alone": lambda: step(run),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            run.step += 1  # a checkpoint of a step that is there already is not written again
            os.sync()
            took = way()
            if number:  # the first round makes the files and the copies
                seconds[name].append(took)
    return {**seconds, "step beside": sides.step_beside[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        run = make(args.layers, args.width)
        seconds = measure(run, folder, args.rounds)
        size = (folder / "state.pt").stat().st_size
    finally:
        shutil.rmtree(folder)
        leave()
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        name: statistics.median(one / other for one, other in zip(seconds[over], seconds[under], strict=True))
        for name, over, under in (
            ("asynchronous / synchronous", "asynchronous", "synchronous"),
            ("synchronous / torch.save", "synchronous", "torch.save"),
            ("step beside a save / step alone", "step beside", "step alone"),
        )
    }
    table = Table(
        "", "median s", "least", "most", title=f"save of {size / 2**30:.2f} GiB, {args.rounds} rounds"
    )
    for name, values in seconds.items():
        table.add_row(name, f"{median[name]:.3f}", f"{min(values):.3f}", f"{max(values):.3f}")
    console = Console()
    console.print(table)
    for name, ratio in ratios.items():
        aim = f" (aim: {TARGETS[name]})" if name in TARGETS else ""
        console.print(f"{name}: {ratio:.3f}{aim}")
    console.print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    if args.json:
        args.json.write_text(json.dumps({"seconds": seconds, "ratios": ratios, "bytes": size}))


if __name__ == "__main__":
    main()
