"""The records of made-up runs that differ in a setting and a seed, with one evaluation each."""

import json
from pathlib import Path

from trainer.report.comparison import Comparison, combine
from trainer.report.runs import Run, read_run


def make_run(run_dir: Path, live: float, average: float, *overrides: str, meta: str = "{}") -> Path:
    run_dir.mkdir(parents=True)
    record = {
        "train/step": 100,
        "eval/live/loss": live,
        "eval/ema/0.9/loss": average,
        "eval/gap/0.9/loss": live - average,
        "eval/gap/0.9/loss_se": 0.01,
    }
    (run_dir / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (run_dir / "overrides.yaml").write_text(json.dumps(list(overrides)))
    (run_dir / "meta.json").write_text(meta)
    return run_dir


def sweep(folder: Path) -> Path:
    make_run(folder / "0", 2.0, 1.5, "optimizer.lr=0.1", "seed=0", f"run_dir={folder}/0")
    make_run(folder / "1", 2.2, 1.5, "optimizer.lr=0.1", "seed=1", f"run_dir={folder}/1")
    make_run(folder / "2", 1.9, 1.8, "optimizer.lr=0.2", "seed=0", f"run_dir={folder}/2")
    return folder


def read(folder: Path) -> list[Run]:
    return [read_run(path) for path in sorted(folder.iterdir())]


def compared(runs: list[Run]) -> Comparison:
    comparison = combine(runs, "loss")
    assert comparison is not None
    return comparison
