"""The runs that findings read: each is made once, by a command line, and kept in a folder."""

import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.report.runs import read_run
from trainer.rundir.files import write_atomically
from trainer.rundir.keys import AVERAGE


class Runs:
    """Runs and averages in one folder; those that are there already are not made again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._folder.mkdir(parents=True, exist_ok=True)

    def train(self, name: str, *overrides: str) -> Path:
        """Train a run, or go on with it if it was interrupted; return its directory."""
        path = self._folder / name
        if (path / "report" / "index.html").exists():
            return path
        begin = (f"run_dir={path}", *overrides, "logger=none") if not path.exists() else (f"resume={path}",)
        self._polyak("train", *begin)
        return path

    def made(self, run: Path, *profiles: str) -> dict[str, float]:
        """Return the loss of each average that `polyak posthoc` makes of a run, over both halves of the samples."""
        averages = self.result(run, *profiles)["averages"]
        return {name: (values["half_a"] + values["half_b"]) / 2 for name, values in averages.items()}

    def result(self, run: Path, *profiles: str) -> dict[str, Any]:
        """Return the result file of `polyak posthoc`; without profiles it searches the decay."""
        key = hashlib.sha256(" ".join(profiles).encode()).hexdigest()[:12]
        path = self._folder / f"{run.name}.posthoc-{key}.json"
        if not path.exists():
            before = set((run / "evaluations").glob("*.json"))
            self._polyak("posthoc", str(run), *profiles)
            (new,) = set((run / "evaluations").glob("*.json")) - before
            write_atomically(path, new.read_text())  # an interrupted command leaves no part of it
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def _polyak(self, command: str, *arguments: str) -> None:
        words = [sys.executable, "-m", "trainer" if command == "train" else f"launch.{command}", *arguments]
        print("+ polyak", command, *arguments, file=sys.stderr, flush=True)
        done = subprocess.run(
            words, cwd=self._folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"polyak {command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")


def evaluated(run: Path, weights: str, metric: str = "loss") -> dict[int, float]:
    """Return the value of a metric at each evaluated step, for `live` or `ema/NAME`."""
    return dict(read_run(run).evaluation(weights.removeprefix(AVERAGE), metric).pairs())


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Return mean ± standard deviation over seeds; the mean alone for a single seed."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"
