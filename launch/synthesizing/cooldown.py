"""A real decay of the learning rate to compare averages with: a fork of the run, trained to the same step."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trainer.errors import ConfigError
from trainer.report.statistics import Estimate
from trainer.rundir.checkpoints import MARKER, committed, step_of
from trainer.rundir.directory import FORK, RunDir, sha256_of
from trainer.rundir.files import read_text
from trainer.weights.selection import choose_checkpoint


@dataclass(frozen=True)
class Cooldown:
    """Evaluated weights of the fork."""

    name: str
    """Name of the fork's directory."""
    begins: int
    """Step at which it left the run."""
    values: Tensor
    """Values of the primary metric, float64 `[samples]`, on the samples of all other weights."""
    higher_is_better: bool
    """Direction of the metric."""

    def share(self, live: Tensor, values: Tensor) -> Estimate | None:
        """Return the share of the fork's gain over the live weights that other weights reach.

        On half B of the samples; its standard error is that of a ratio of means by the delta method. None if the fork
        has no clear gain (two standard errors). `live` are the values of the run's live weights at the same step, as
        `values` float64 `[samples]`.
        """
        whole, part = (live - self.values)[1::2].double(), (live - values)[1::2].double()
        gain, count = float(whole.mean()), whole.numel()
        if not (-gain if self.higher_is_better else gain) > 2 * float(whole.std()) / math.sqrt(count):
            return None
        ratio = float(part.mean()) / gain
        error = float((part - ratio * whole).std()) / (math.sqrt(count) * abs(gain))
        return Estimate(ratio, error, count - 1)


def checkpoint_of_fork(path: Path, run_dir: RunDir, step: int) -> tuple[Path, int]:
    """Return the checkpoint of a fork of a run at a step, and the step at which it left the run. No collective.

    Raises:
        ConfigError: It is no run directory, is not a fork of this run, or has no checkpoint of this step.
    """
    fork = RunDir.open(path, key="cooldown")
    facts = fork.meta.get(FORK, {})
    begins = facts.get("step")
    if not isinstance(begins, int) or not _is_of(facts, run_dir, begins):
        raise ConfigError(f"cooldown: expected a run that was forked from {run_dir.path}, got {path}")
    try:
        return choose_checkpoint(fork, step).path, begins
    except ConfigError as error:
        raise ConfigError(
            f"cooldown: {error}; the averages of {run_dir.path} are made at step {step}"
        ) from error


def _is_of(facts: dict[str, object], run_dir: RunDir, step: int) -> bool:
    """Return whether a fork began at a checkpoint of this run; one that was deleted since counts by its path."""
    for path in committed(run_dir.checkpoints):
        if step_of(path) == step:
            return facts.get("sha256") == {MARKER: sha256_of(read_text(path / MARKER))}
    return os.path.realpath(str(facts.get("path"))) == os.path.realpath(run_dir.path)
