"""`python -m launch.prune RUN_DIR keep=N`: delete old checkpoints of a run that no process writes."""

import sys
from collections.abc import Sequence
from pathlib import Path

from launch.cli import command, parse_count, split_run_dir
from launch.sweeps.attempt import running_on
from trainer.checkpoint.places import prune
from trainer.errors import EXIT_DONE, EXIT_FAILED, ConfigError
from trainer.report.runs import is_compared, read_run
from trainer.rundir.checkpoints import committed, step_of
from trainer.rundir.directory import RunDir
from trainer.shell.printable import print_text
from trainer.weights.best_step import BestStep, best_step

HELP = """\
Delete old checkpoints of a run, never the newest, and print how many bytes that freed.

usage: python -m launch.prune RUN_DIR keep=N

  RUN_DIR  a run directory that no process uses
  keep=N   number of newest checkpoints to keep, at least 1

step=best of evaluate and export needs the checkpoint of the best step: export it before. A line names it if it goes.
Exit codes: 0 done, 1 a checkpoint could not be deleted, 2 bad input, such as a run that is running.

examples:
  python -m launch.prune outputs/mine keep=1
  python -m launch.prune sweeps/decays/0_decay_0.9 keep=2
"""
KEYS = ("keep",)


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    return command(arguments, HELP, lambda: _prune(arguments))


def _prune(arguments: Sequence[str]) -> int:
    folder, own = split_run_dir(arguments, KEYS)
    if "keep" not in own:
        raise ConfigError("keep: expected a number of checkpoints to keep, as in keep=1, got nothing")
    keep = parse_count("keep", own["keep"])
    run_dir = RunDir.open(folder, key="RUN_DIR")
    run_dir.check_own_folders()
    if (host := running_on(run_dir.path)) is not None:
        raise ConfigError(f"RUN_DIR: {run_dir.path} is in use by a run on {host}; wait for it, or stop it")
    with run_dir.in_use(patience_s=0.0, key="RUN_DIR"):
        before = {path: _size(path) for path in committed(run_dir.checkpoints)}
        if not before:
            raise ConfigError(f"RUN_DIR: {run_dir.path} has no checkpoint yet")
        best, old = _best_of(run_dir, list(before)), list(before)[:-keep]
        if best is not None and best.step in map(step_of, old):
            print_text(f"deletes the checkpoint of the best evaluation: {best.text}")
        warnings = prune(run_dir.checkpoints, list(before)[-1], keep)
        left = committed(run_dir.checkpoints)
    for warning in warnings:
        print_text(warning, error=True)
    gone = [path for path in before if path not in left]
    freed = sum(before[path] for path in gone)
    steps = f" ({', '.join(path.name for path in gone)})" if gone else ""
    print_text(f"deleted {len(gone)} of {len(before)} checkpoints{steps}, freed {freed:,} bytes")
    return EXIT_FAILED if warnings else EXIT_DONE


def _best_of(run_dir: RunDir, checkpoints: Sequence[Path]) -> BestStep | None:
    """Return the best evaluation at the step of a checkpoint; None if the run has none that can be ranked.

    Damaged records are a warning: they are no reason to keep checkpoints.
    """
    if not run_dir.metrics_path.is_file():
        return None
    try:
        run = read_run(run_dir.path, is_compared)
    except ConfigError as error:
        print_text(f"warning: the best evaluation is not known: {error}", error=True)
        return None
    if run.higher_is_better(run.primary_metric) is None:
        return None
    return best_step(run, set(map(step_of, checkpoints)))


def _size(checkpoint: Path) -> int:
    return sum(path.lstat().st_size for path in checkpoint.rglob("*"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
