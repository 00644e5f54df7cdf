"""Decide which documents or files are kept for evaluation, by a hash of their names."""

import hashlib

import numpy as np
import numpy.typing as npt

from trainer.errors import ConfigError


def hash_fraction(name: str) -> float:
    """Return a number in [0, 1) that depends only on `name`, so it is the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:6], "big") / 2**48


def is_held_out(name: str, eval_fraction: float) -> bool:
    """Return whether the document called `name` is kept for evaluation; it does not depend on other documents."""
    return hash_fraction(name) < eval_fraction


def split_rows(
    count: int, eval_fraction: float, too_few: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split `count` rows by a hash of their numbers; return those for training and those for evaluation.

    So a file that grows keeps the split of its first rows. The hash is SplitMix64 (Steele et al., 2014).

    Raises:
        ConfigError: A split would have no rows; the message begins with `too_few`.
    """
    mixed = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    held_out = (mixed ^ (mixed >> np.uint64(31))) < np.uint64(int(eval_fraction * 2**64))
    if held_out.all() or not held_out.any():
        raise ConfigError(f"{too_few} to split by data.eval_fraction={eval_fraction}")
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def check_eval_fraction(eval_fraction: float) -> None:
    """Refuse a fraction outside (0, 1).

    Raises:
        ConfigError: The fraction is not in (0, 1); the message begins with `data.eval_fraction`.
    """
    if not 0 < eval_fraction < 1:
        raise ConfigError(f"data.eval_fraction: {eval_fraction} is not between 0 and 1")
