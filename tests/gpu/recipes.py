"""Some steps of a recipe for GPUs, through the real command line, on synthetic data."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy
from PIL import Image

from tests.gpu.figures import figure

STEPS, LOG_EVERY = 40, 10
"""The last interval is free of compilation."""
ON_A_CARD = {
    "gpt2_124m": ("trainer.global_batch_size=32", "trainer.accumulate=2"),
    "dit_b": ("trainer.global_batch_size=128", "trainer.num_workers=4"),
}
ON_A_CPU = {
    "gpt2_124m": ("model.n_layer=1", "model.n_embd=64", "model.n_head=2", "model.context=64"),
    "dit_b": ("model.depth=1", "model.hidden=64", "model.heads=2", "task.sample_count=2"),
}
"""Overrides that make the models small enough for a rehearsal."""
SMALL = (
    "trainer.steps=4",
    "trainer.log_every=2",
    "trainer.global_batch_size=4",
    "trainer.accumulate=1",
    "trainer.num_workers=0",
    "sharding.compile=false",
)
FIGURES = {
    "time/step_s": "s",
    "time/ema_update_s": "s",
    "throughput/samples_per_s": "samples/s",
    "throughput/tokens_per_s": "tokens/s",
    "throughput/tflops": "TFLOP/s",
    "mem/peak_gib": "GiB",
    "train/skipped_steps": "steps",
}
"""What is printed of the last record, and its unit."""


def tokens(folder: Path) -> list[str]:
    """Write two token files as the recipe reads them: 256 tokens of 50,257 occur, which is soon learnt."""
    drawn = numpy.random.default_rng(0)
    for name, number in (("train", 2_000_000), ("eval", 200_000)):
        drawn.integers(0, 256, number).astype(numpy.uint16).tofile(folder / f"{name}.bin")
    files = [f"data.{name}_path={folder / name}.bin" for name in ("train", "eval")]
    return [*files, "data.vocab_size=50257", "schedule.warmup_steps=2"]


def images(folder: Path) -> list[str]:
    """Write a folder of coloured images in two classes."""
    drawn = numpy.random.default_rng(0)
    for label in ("a", "b"):
        (folder / "images" / label).mkdir(parents=True)
        for k in range(300):
            pixels = drawn.integers(0, 256, (32, 32, 3)).astype(numpy.uint8)
            Image.fromarray(pixels).save(folder / "images" / label / f"{k}.png")
    return [f"data.path={folder / 'images'}", "model.num_classes=2", "task.distance_steps=4"]


DATA = {"gpt2_124m": tokens, "dit_b": images}


def train(*arguments: str) -> float:
    """Run the trainer in a process of its own; returns its seconds."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "trainer", *arguments]
    # What it prints goes to the log: standard output is for figures.
    code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    if code:
        raise SystemExit(f"{' '.join(command)}: exit code {code}")
    return time.perf_counter() - begin


def show(recipe: str, run_dir: Path) -> bool:
    """Print what the records say of speed, memory and loss; returns whether the loss fell."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    first, last = records[0], records[-1]
    for key, unit in FIGURES.items():
        if key in last:
            figure(f"{recipe}/{key}", last[key], unit)
    for when, record in (("first", first), ("last", last)):
        figure(f"{recipe}/train/loss, {when}", record["train/loss"])
    for key, value in last.items():
        if key.startswith("eval/") and key.endswith("/loss"):
            figure(f"{recipe}/{key}", value)
    return bool(last["train/loss"] < first["train/loss"])


def main(device: str, recipe: str) -> None:
    """Train a recipe, print its figures, and resume it for a few more steps."""
    real = device == "cuda"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = (*ON_A_CARD[recipe], f"trainer.steps={STEPS}", f"trainer.log_every={LOG_EVERY}")
        seconds = train(
            f"experiment={recipe}",
            *DATA[recipe](folder),
            f"run_dir={folder / 'run'}",
            f"trainer.device={device}",
            f"trainer.eval_samples={64 if real else 4}",
            "trainer.save_every=0",
            "logger=none",
            *(size if real else (*SMALL, *ON_A_CPU[recipe])),
        )
        figure(f"{recipe}/whole run", seconds, "s")
        learnt = show(recipe, folder / "run")
        steps = STEPS + LOG_EVERY if real else 6
        seconds = train(f"resume={folder / 'run'}", f"trainer.steps={steps}")
        figure(f"{recipe}/resumed run of {steps - (STEPS if real else 4)} steps", seconds, "s")
        if real and not learnt:  # the rehearsal has too few steps
            raise SystemExit(f"{recipe}: the loss did not fall")


if __name__ == "__main__":
    main(*sys.argv[1:])
