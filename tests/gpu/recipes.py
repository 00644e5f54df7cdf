"""A few steps of the recipes for GPUs, through the real command line, on synthetic data."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
from PIL import Image

from tests.gpu.figures import figure

STEPS = 30
ON_A_CPU = {
    "gpt2_124m": ("model.n_layer=1", "model.n_embd=64", "model.n_head=2", "model.context=64"),
    "dit_b": ("model.depth=1", "model.hidden=64", "model.heads=2"),
}
"""Overrides that make the models small enough for a rehearsal."""


def tokens(folder: Path) -> list[str]:
    """Write two token files as the recipe reads them."""
    drawn = numpy.random.default_rng(0)
    for name, number in (("train", 2_000_000), ("eval", 200_000)):
        drawn.integers(0, 50257, number).astype(numpy.uint16).tofile(folder / f"{name}.bin")
    return [
        f"data.train_path={folder / 'train.bin'}",
        f"data.eval_path={folder / 'eval.bin'}",
        "trainer.accumulate=1",
        "schedule.warmup_steps=5",
    ]


def images(folder: Path) -> list[str]:
    """Write a folder of coloured images in two classes."""
    drawn = numpy.random.default_rng(0)
    for label in ("a", "b"):
        (folder / "images" / label).mkdir(parents=True)
        for k in range(300):
            pixels = drawn.integers(0, 256, (32, 32, 3)).astype(numpy.uint8)
            Image.fromarray(pixels).save(folder / "images" / label / f"{k}.png")
    return [f"data.path={folder / 'images'}", "model.num_classes=2", "task.distance_steps=4"]


def train(experiment: str, device: str, data: list[str], folder: Path) -> None:
    """Train some steps and print what the records say of speed, memory and loss."""
    small = device == "cpu"
    overrides = [
        *data,
        f"run_dir={folder / 'run'}",
        f"trainer.device={device}",
        f"trainer.steps={4 if small else STEPS}",
        f"trainer.global_batch_size={4 if small else 32}",
        f"trainer.eval_samples={4 if small else 64}",
        "trainer.eval_batch_size=4",
        "trainer.log_every=2",
        "trainer.save_every=0",
        "logger=none",
        *([*ON_A_CPU[experiment], "sharding.compile=false", "trainer.num_workers=0"] if small else []),
    ]
    command = [sys.executable, "-m", "trainer", f"experiment={experiment}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"{experiment}: exit code {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        )
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    first, last = records[0], records[-1]
    for key, unit in (
        ("time/step_s", "s"),
        ("time/ema_update_s", "s"),
        ("throughput/samples_per_s", "samples/s"),
        ("throughput/tflops", "TFLOP/s"),
        ("mem/peak_gib", "GiB"),
        ("train/skipped_steps", "steps"),
    ):
        if key in last:
            figure(f"{experiment}/{key}", round(last[key], 5), unit)
    figure(
        f"{experiment}/train/loss, first to last", f"{first['train/loss']:.4f} to {last['train/loss']:.4f}"
    )
    evaluated = {
        key: value for key, value in last.items() if key.startswith("eval/") and key.endswith("/loss")
    }
    for key, value in evaluated.items():
        figure(f"{experiment}/{key}", round(value, 5))


def main(device: str) -> None:
    """Train both recipes."""
    for experiment, data in (("gpt2_124m", tokens), ("dit_b", images)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            train(experiment, device, data(folder), folder)


if __name__ == "__main__":
    main(sys.argv[1])
