"""What torchrun says of this process, and how a process says what is wrong; without importing torch."""

import os
import sys
import traceback

from trainer.config import ConfigError


def launched_world_size() -> int:
    """Number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """This process's rank under torchrun, 0 without it."""
    return int(os.environ.get("RANK", "0"))


def complain(error: ConfigError) -> None:
    """Print bad input as one line; with HYDRA_FULL_ERROR=1, as for Hydra's own errors, also where it came from."""
    rank = launched_rank()
    print(f"error: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exception(error)
