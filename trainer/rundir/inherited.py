"""Configuration of a command line that continues an existing run (`resume=`) or forks it (`fork=`). No torch."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from trainer.config.frozen import resume_config
from trainer.errors import ConfigError
from trainer.rundir.directory import RunDir

_AT_STEP = re.compile(r"(.+)@(\d+|last|best)", re.ASCII)


def split_step(text: str) -> tuple[str, str | None]:
    """Return the path and the step of `PATH[@STEP]`; a text that is an existing path has no step."""
    match = None if os.path.exists(text) else _AT_STEP.fullmatch(text)
    return (match[1], match[2]) if match else (text, None)


def forked_run(text: str) -> tuple[RunDir, str]:
    """Return the run directory and the step that `fork=RUN_DIR[@STEP]` names; without a step, `last`.

    Raises:
        ConfigError: There is no such run directory, or its configuration was changed.
    """
    path, step = split_step(text)
    return RunDir.open(Path(path), key="fork"), step or "last"


def inherit(composed: DictConfig, overrides: Sequence[str]) -> tuple[DictConfig, RunDir | None]:
    """Return the configuration of a command line, and the run directory of `resume=`, None for a new run.

    Both arguments come from that command line; the overrides are as typed.

    Raises:
        ConfigError: The other run cannot be opened, or an override is not possible with it.
    """
    if composed.resume == "":  # as a path it would mean the working directory
        raise ConfigError("resume: expected RUN_DIR, got ''")
    if composed.resume is not None:
        resumed = RunDir.open(composed.resume)
        return resume_config(resumed.latest_config(), composed, overrides), resumed
    if composed.fork is not None:
        other, _ = forked_run(composed.fork)
        return resume_config(other.latest_config(), composed, overrides, key="fork"), None
    return composed, None
