"""The state that `fork=` names: a checkpoint of another run, from which a new run begins."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError, below
from trainer.rundir.checkpoints import MARKER
from trainer.rundir.directory import RunDir, sha256_of
from trainer.rundir.files import read_text
from trainer.rundir.inherited import forked_run
from trainer.weights.selection import choose_checkpoint


@dataclass(frozen=True)
class Fork:
    """A checkpoint of another run."""

    run_dir: RunDir
    """Directory of the other run."""
    checkpoint: Path
    facts: Mapping[str, Any]
    """Path, step and digest for `meta.json`, JSON values."""


def open_fork(text: str, steps: int, recorded: Mapping[str, Any] | None) -> Fork:
    """Return the checkpoint that `fork=RUN_DIR[@STEP]` names. No collective; one rank calls it.

    Args:
        text: value of `fork`.
        steps: optimizer steps of the new run.
        recorded: entry `fork` of the new run's `meta.json`, if an earlier process began it. If that was from the same
            `text`, it begins again at the same checkpoint, although the other run may have gone on.

    Raises:
        ConfigError: There is no such run or checkpoint, it is not the one that was recorded, or no step is left after
            it.
    """
    run_dir, wanted = forked_run(text)
    if recorded is None or recorded.get("source") != text:
        recorded = {}
    if isinstance(recorded.get("step"), int):
        wanted = str(recorded["step"])
    with below("fork"):
        chosen = choose_checkpoint(run_dir, wanted)
        marker = sha256_of(read_text(chosen.path / MARKER))
    if recorded.get("sha256", {MARKER: marker}) != {MARKER: marker}:
        raise ConfigError(
            f"fork: {chosen.path} was changed, or is of another run than the one from which this run began"
        )
    if chosen.step >= steps:
        raise ConfigError(
            f"trainer.steps: expected more than the {chosen.step} steps done at {text}, which fork= names, got {steps}"
        )
    facts = {"source": text, "path": str(run_dir.path), "step": chosen.step, "sha256": {MARKER: marker}}
    return Fork(run_dir, chosen.path, facts)
