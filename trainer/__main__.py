"""Command `python -m trainer`: one run, in this process or in all processes that torchrun started.

Exit codes: 0 done, 1 failed (as when the disk is full), 2 bad input, 75 stopped by a signal after saving
(`resume=RUN_DIR` continues the run).
"""

import sys
from collections.abc import Sequence

from trainer.cli import ending, importing, run_command
from trainer.distributed.torchrun import refuse_separate_tasks


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""

    def work() -> int:
        with importing():  # imports Hydra; --help and --cfg end here
            from trainer.config.compose import compose

            composed, overrides = compose(arguments)
        refuse_separate_tasks("train")
        with importing():  # imports torch
            from trainer.run import run

        return run(composed, overrides)

    return run_command(work, arguments)


if __name__ == "__main__":
    sys.exit(ending(lambda: main(sys.argv[1:])))
