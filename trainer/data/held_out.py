"""Which documents or files are kept for evaluation."""

import hashlib

from trainer.errors import ConfigError


def hash_fraction(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone: the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:6], "big") / 2**48


def is_held_out(name: str, eval_fraction: float) -> bool:
    """Whether the document called `name` is for evaluation, whatever other documents there are."""
    return hash_fraction(name) < eval_fraction


def check_eval_fraction(eval_fraction: float) -> None:
    """Refuse a share outside (0, 1).

    Raises:
        ConfigError: naming `data.eval_fraction`.
    """
    if not 0 < eval_fraction < 1:
        raise ConfigError(f"data.eval_fraction: {eval_fraction} is not between 0 and 1")
