"""Configuration of a command line that continues an existing run (`resume=`) or forks it (`fork=`). No torch."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from trainer.config.compose import resume_config
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

    Args:
        composed: configuration composed from the command line.
        overrides: overrides of the command line, as typed.

    Raises:
        ConfigError: The other run cannot be opened, or an override is not possible with it.
    """
    if composed.resume == "":  # as a path it would mean the working directory
        raise ConfigError("resume: expected RUN_DIR, got ''")
    if composed.resume is None and composed.fork is None:
        return composed, None
    key = "fork" if composed.resume is None else "resume"
    other = RunDir.open(composed.resume) if key == "resume" else forked_run(composed.fork)[0]
    before = other.latest_config()
    return resume_config(before, composed, overrides, key=key), other if key == "resume" else None
