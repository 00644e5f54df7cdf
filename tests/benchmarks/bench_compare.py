"""How long `python -m launch.compare` takes over an archive of many runs, and how much memory.

    python -m tests.benchmarks.bench_compare [--runs 500] [--evaluations 1000] [--averages 4] [--json PATH]

The archive is made up: a grid of learning rates and weight decays, three seeds of each, every record with two metrics,
the gaps of every average and its divergence by block, as a real run logs them, and the pairs of each evaluation. Peak
memory is that of the largest process: the command itself, which holds all that those that read for it have found.
"""

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.integration.commands import environment

SEEDS = 3
BLOCKS = ("embed", "blocks.0", "blocks.1", "norm")
ARCHIVE_TARGET = (20.0, 1024.0)
"""Seconds and MiB that are aimed at for 500 runs of 1,000 evaluations."""
SWEEP_TARGET = (5.0, 1024.0)
"""And for a sweep of 3 seeds with 4 decays."""


def record(step: int, of: int, decays: list[float], lr: float, seed: random.Random) -> dict[str, float]:
    """One line of `metrics.jsonl`, of a training step with an evaluation."""
    done = step / of
    live = 1.5 + 2 * math.exp(-6 * done) + 20 * abs(lr - 0.003) + 0.05 * seed.random()
    logged = {"train/step": step, "train/loss": live, "train/grad_norm": seed.random(), "train/lr": lr}
    logged |= {"time/step_s": 0.1 + 0.01 * seed.random(), "throughput/samples_per_s": 100 * seed.random()}
    logged |= {"eval/live/loss": live, "eval/live/accuracy": 1 / live}
    for decay in decays:
        name, horizon = f"{decay:g}", 1 / (1 - decay)
        gap = 0.05 * (1 - math.exp(-horizon / 50)) - horizon / (50 * step + 1) + 0.005 * seed.random()
        logged |= {
            f"ema/{name}/decay": decay,
            f"ema/{name}/rel_l2": 0.01 * math.sqrt(horizon) * seed.random(),
        }
        logged |= {f"ema/{name}/block/{block}/rel_l2": 0.02 * seed.random() for block in BLOCKS}
        logged |= {f"eval/ema/{name}/loss": live - gap, f"eval/ema/{name}/accuracy": 1 / (live - gap)}
        logged |= {f"eval/gap/{name}/loss": gap, f"eval/gap/{name}/loss_se": 0.004 * seed.random()}
        logged |= {f"eval/gap/{name}/accuracy": -gap / 4, f"eval/gap/{name}/accuracy_se": 0.002}
    return logged


def pairs_line(record: dict[str, float], decays: list[float], random: np.random.Generator) -> str:
    """One line of `pairs.jsonl`, of the same evaluation, with two metrics."""
    metrics = {}
    for metric in ("loss", "accuracy"):
        means = [record[f"eval/live/{metric}"], *(record[f"eval/ema/{decay:g}/{metric}"] for decay in decays)]
        root = random.normal(0, 0.1, (len(means), len(means) + 3))
        products = (root @ root.T).tolist()
        metrics[metric] = {
            "samples": 256,
            "weights": ["live", *(f"{decay:g}" for decay in decays)],
            "means": means,
            "products": [row[: place + 1] for place, row in enumerate(products)],
        }
    return json.dumps({"train/step": record["train/step"], "pairs": metrics})


def make_archive(folder: Path, runs: int, evaluations: int, averages: int) -> int:
    """Write a made-up archive; returns its size in bytes."""
    decays = [round(1 - 10 ** -(1 + place / 2), 4) for place in range(averages)]
    source, numbers = random.Random(0), np.random.default_rng(0)
    size = 0
    for number in range(runs):
        group, seed = divmod(number, SEEDS)
        lr, weight_decay = 0.001 * (1 + group % 13), 0.01 * (group // 13)
        run_dir = folder / f"{number:04}_lr_{lr:g}_wd_{weight_decay:g}_seed_{seed}"
        run_dir.mkdir(parents=True)
        config = {
            "experiment": "archive",
            "seed": seed,
            "model": {"_target_": "models.gpt.GPT", "n_layer": 12, "n_head": 12, "n_embd": 768},
            "ema": {"decays": decays, "type": "constant", "start_iter": 0},
            "optimizer": {"name": "AdamW", "lr": lr, "args": {"weight_decay": weight_decay}},
            "trainer": {f"key_{n}": n for n in range(80)} | {"steps": 10 * evaluations, "eval_samples": 256},
        }
        (run_dir / "config.yaml").write_text(_yaml(config))
        (run_dir / "overrides.yaml").write_text(f'- "optimizer.lr={lr:g}"\n- "seed={seed}"\n')
        meta = {"primary_metric": "loss", "higher_is_better": ["accuracy"], "metric_units": {"loss": "nats"}}
        (run_dir / "meta.json").write_text(json.dumps(meta))
        records = [
            record(10 * (place + 1), 10 * evaluations, decays, lr, source) for place in range(evaluations)
        ]
        files = {
            "metrics.jsonl": map(json.dumps, records),
            "pairs.jsonl": (pairs_line(own, decays, numbers) for own in records),
        }
        for name, lines in files.items():
            content = "\n".join(lines) + "\n"
            size += len(content)
            (run_dir / name).write_text(content)
    return size


def _yaml(config: dict[str, object], indent: str = "") -> str:
    lines = []
    for key, value in config.items():
        if isinstance(value, dict):
            lines.append(f"{indent}{key}:\n{_yaml(value, indent + '  ')}")
        else:
            lines.append(f"{indent}{key}: {json.dumps(value)}\n")
    return "".join(lines)


def timed(folder: Path, out: Path) -> tuple[float, float]:
    """Wall seconds and peak MiB of the command line over `folder`."""
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "launch.compare", str(folder), f"out={out}"],
        env=environment(),
        stdout=subprocess.DEVNULL,
        check=True,
    )
    wall_s = time.perf_counter() - begin
    return wall_s, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="python -m tests.benchmarks.bench_compare"
    )
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--evaluations", type=int, default=1000)
    parser.add_argument("--averages", type=int, default=4)
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    table = Table("archive", "size, MB", "s", "target", "peak MiB", "target", title="launch.compare")
    figures = {}
    with tempfile.TemporaryDirectory() as made:
        # The small one first: peaks of children only rise.
        for name, sizes, target in (
            ("sweep: 3 seeds × 4 decays", (SEEDS, 50, 4), SWEEP_TARGET),
            (
                f"{arguments.runs} runs × {arguments.evaluations} evaluations",
                (arguments.runs, arguments.evaluations, arguments.averages),
                ARCHIVE_TARGET,
            ),
        ):
            folder = Path(made) / str(len(figures))
            size = make_archive(folder, *sizes)
            wall_s, peak_mib = timed(folder, Path(made) / f"out_{len(figures)}")
            figures[name] = {"bytes": size, "wall_s": wall_s, "peak_mib": peak_mib}
            told = [
                f"{limit:g} {'kept' if value <= limit else 'missed'}"
                for value, limit in zip((wall_s, peak_mib), target, strict=True)
            ]
            table.add_row(name, f"{size / 1e6:.0f}", f"{wall_s:.1f}", told[0], f"{peak_mib:.0f}", told[1])
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
