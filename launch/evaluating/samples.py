"""Replace `trainer.eval_samples=auto` on the command line of an evaluation by the number that follows from the run."""

from collections.abc import Sequence
from pathlib import Path

from trainer.evaluation.enough import KEY, samples_for
from trainer.report.runs import is_compared, read_run

AUTO = f"{KEY}=auto"


def with_number(path: Path, overrides: Sequence[str]) -> list[str]:
    """Return the overrides with a number in place of `trainer.eval_samples=auto`, if it is among them.

    Args:
        path: run directory.
        overrides: changes to the configuration, as typed.

    Raises:
        ConfigError: `auto` is among them, and the run has no evaluation from which the number follows.
    """
    if AUTO not in overrides:
        return list(overrides)
    number = samples_for(read_run(path, is_compared))
    return [f"{KEY}={number}" if override == AUTO else override for override in overrides]
