"""The coefficients of a merge: the decrements of a learning-rate decay, or the closest to a profile."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ema.posthoc import DECAYS, Factor, Snapshot, Weights, decrements, given_weights, solve
from launch.merging.options import AVERAGES, average_of
from trainer import schedules
from trainer.errors import ConfigError, blamed_on
from trainer.rundir.files import open_regular, read_text

MAX_PROFILE_BYTES = 1 << 27
"""Largest size in bytes of a file with a profile."""
GRID = 1 << 20
"""Steps in which a schedule is divided, to have its factor at any share."""


def coefficients_of(profile: str, steps: Sequence[int]) -> tuple[list[float], list[str]]:
    """Return the coefficients of a profile for checkpoints of these steps.

    Args:
        profile: name of a decay or of a schedule, `RULE:VALUE`, or a file with the weights of the newest steps.
        steps: steps of the checkpoints, rising.

    Returns:
        The coefficient of each checkpoint, with sum 1, and remarks for the user on how close they come to the profile.

    Raises:
        ConfigError: The profile is unknown or invalid; the message begins with `profile`.
    """
    decays = {**_schedules(), **DECAYS}
    if profile in decays:
        with blamed_on("profile"):
            return decrements(decays[profile], steps), []
    rule, colon, value = profile.partition(":")
    if colon and rule in AVERAGES:
        return _closest(steps, Snapshot(steps[-1], average_of(rule, value, f"profile: {rule}")))
    if Path(profile).suffix in (".txt", ".npy"):
        with blamed_on("profile"):
            return _closest(steps, given_weights(weights_in(Path(profile)), steps[-1]))
    rules = ", ".join(f"{name}:VALUE" for name in AVERAGES)
    raise ConfigError(
        f"profile: expected one of {', '.join(decays)}, {rules}, or a file FILE.txt or FILE.npy of weights,"
        f" got {profile[:300]}"
    )


def _schedules() -> Mapping[str, Factor]:
    """Return the built-in learning-rate schedules by name, each as a factor of the share that is done."""
    return {
        name: partial(_factor, function)
        for name, function in inspect.getmembers(schedules, inspect.isfunction)
        if not name.startswith("_") and function is not schedules.inverse_sqrt  # which has no last step
    }


def _factor(schedule: Callable[[int, int], float], done: float) -> float:
    return schedule(round(done * GRID), GRID)


def weights_in(path: Path) -> Tensor:
    """Return the weights of the newest steps in a text of numbers or in a file of `numpy.save`; no pickle is read.

    Raises:
        ConfigError: The file cannot be read or has no such numbers.
    """
    with blamed_on("profile"):
        return torch.from_numpy(_read(path))


def _read(path: Path) -> np.ndarray:
    try:
        if path.suffix == ".txt":
            return np.array([float(word) for word in read_text(path, MAX_PROFILE_BYTES).split()])
        with open_regular(path) as file:
            return np.asarray(np.load(file, allow_pickle=False), dtype=np.float64)
    except OSError as error:
        raise ConfigError(f"profile: {path} cannot be read: {error.strerror or error}") from error


def _closest(steps: Sequence[int], target: Snapshot | Weights) -> tuple[list[float], list[str]]:
    found = solve([Snapshot(step) for step in steps], target)
    note = (
        "the coefficients are the closest to the profile that these checkpoints allow; predicted error"
        f" {found.error:.2%} of the distance between the profile's weights and the newest, for independent steps"
    )
    return found.coefficients, [note, *found.warnings]
