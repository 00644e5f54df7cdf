"""One run and `polyak posthoc` against eight runs, each with an average of one decay.

    python -m tests.benchmarks.bench_posthoc [--steps 500] [--folder FOLDER] [--json PATH] [KEY=VALUE ...]

All are the quickstart. The one run keeps the averages and the snapshots of `ema=posthoc`, and `polyak posthoc` makes
and evaluates the eight decays. It runs after the fourth of the eight, so that a slow drift of the machine counts for
both sides. The losses of the two sides must agree, and so must the best decay.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.findings.runs import evaluated
from tests.integration.commands import environment

DECAYS = ("0.8", "0.9", "0.95", "0.97", "0.98", "0.99", "0.995", "0.998")
TARGET = 1 / 7
"""Largest ratio of the times that is aimed at."""
TARGET_LOSS = 1e-3
"""Largest difference of a loss that is aimed at."""


def command(module: str, *arguments: str) -> float:
    """Run a command and return its wall time in seconds."""
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", module, *arguments], env=environment(), stdout=subprocess.DEVNULL, check=True
    )
    return time.perf_counter() - begin


def one_run(folder: Path, settings: list[str]) -> tuple[float, float, dict[str, float]]:
    """Train once and make all decays; return the seconds of both commands and the loss of each decay."""
    run_dir, out = folder / "one", folder / "one.json"
    train_s = command("trainer", *settings, "ema=posthoc", f"run_dir={run_dir}")
    made_s = command("launch.posthoc", str(run_dir), f"decay={','.join(DECAYS)}", f"out={out}")
    averages = json.loads(out.read_text())["averages"]
    halves = {decay: averages[f"decay {decay}"] for decay in DECAYS}
    return train_s, made_s, {decay: (own["half_a"] + own["half_b"]) / 2 for decay, own in halves.items()}


def own_run(folder: Path, settings: list[str], decay: str) -> tuple[float, float]:
    """Train with the average of one decay; return seconds and the loss of the average at the last step."""
    run_dir = folder / decay
    train_s = command("trainer", *settings, "ema=constant", f"ema.decay={decay}", f"run_dir={run_dir}")
    losses = evaluated(run_dir, f"ema/{decay}")
    return train_s, losses[max(losses)]


def measure(folder: Path, settings: list[str]) -> dict[str, object]:
    """Train and evaluate both sides; print each time as it is known."""
    runs = {}
    for number, decay in enumerate(DECAYS):
        if number == len(DECAYS) // 2:
            train_s, made_s, made = one_run(folder, settings)
            print(f"one run {train_s:.1f} s, posthoc {made_s:.1f} s", file=sys.stderr, flush=True)
        runs[decay] = own_run(folder, settings, decay)
        print(f"decay {decay}: {runs[decay][0]:.1f} s", file=sys.stderr, flush=True)
    tracked = {decay: loss for decay, (_, loss) in runs.items()}
    return {
        "train_s": train_s,
        "posthoc_s": made_s,
        "runs_s": {decay: seconds for decay, (seconds, _) in runs.items()},
        "ratio": (train_s + made_s) / sum(seconds for seconds, _ in runs.values()),
        "made": made,
        "tracked": tracked,
        "difference": max(abs(made[decay] - tracked[decay]) for decay in DECAYS),
        "same_best": min(made, key=made.__getitem__) == min(tracked, key=tracked.__getitem__),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="python -m tests.benchmarks.bench_posthoc"
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--folder", type=Path, help="new folder for the runs, which is kept")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the configuration")
    arguments = parser.parse_args()
    settings = [
        "experiment=quickstart",
        "logger=none",
        f"trainer.steps={arguments.steps}",
        *arguments.overrides,
    ]
    with tempfile.TemporaryDirectory() as made:
        found = measure(arguments.folder or Path(made), settings)
    show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def show(found: dict) -> None:
    table = Table("decay", "made from one run", "tracked by its own run", title="loss at the last step")
    for decay in DECAYS:
        table.add_row(decay, f"{found['made'][decay]:.5f}", f"{found['tracked'][decay]:.5f}")
    Console().print(table)
    one, eight = found["train_s"] + found["posthoc_s"], sum(found["runs_s"].values())
    kept = "kept" if found["ratio"] <= TARGET else "missed"
    print(f"one run {found['train_s']:.1f} s + posthoc {found['posthoc_s']:.1f} s = {one:.1f} s")
    print(f"eight runs {eight:.1f} s; ratio 1/{1 / found['ratio']:.2f} (aim 1/7: {kept})")
    kept = "kept" if found["difference"] <= TARGET_LOSS else "missed"
    print(f"largest difference of a loss {found['difference']:.1e} (aim {TARGET_LOSS:g}: {kept})")
    print(f"the same best decay: {'yes' if found['same_best'] else 'NO'}")


if __name__ == "__main__":
    main()
