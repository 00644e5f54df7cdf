"""Decide which documents or files are kept for evaluation, by a hash of their names."""

import hashlib

from trainer.errors import ConfigError


def hash_fraction(name: str) -> float:
    """Return a number in [0, 1) that depends only on `name`, so it is the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:6], "big") / 2**48


def is_held_out(name: str, eval_fraction: float) -> bool:
    """Return whether the document called `name` is kept for evaluation; it does not depend on other documents."""
    return hash_fraction(name) < eval_fraction


def check_eval_fraction(eval_fraction: float) -> None:
    """Refuse a fraction outside (0, 1).

    Raises:
        ConfigError: The fraction is not in (0, 1); the message begins with `data.eval_fraction`.
    """
    if not 0 < eval_fraction < 1:
        raise ConfigError(f"data.eval_fraction: {eval_fraction} is not between 0 and 1")
