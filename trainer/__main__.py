"""`python -m trainer`: one run, in this process or in all that torchrun started.

Exit codes: 0 done, 2 bad input, 75 stopped by a signal after saving (the same run goes on with `resume=RUN_DIR`).
"""

import os
import sys

from trainer.config import ConfigError
from trainer.distributed_env import complain, launched_rank, launched_world_size


def main() -> int:
    """Run the command line of this process and return its exit code."""
    from trainer.compose import compose

    # OpenMP's threads spin while they wait: a step on two idle cores is a quarter faster for it, and six times slower
    # as soon as another program wants a core too. Read when torch is imported, so it is set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        composed, overrides = compose()
        from trainer.run import run  # torch is imported here, after --help and --cfg were answered

        return run(composed, overrides)
    except ConfigError as error:
        rank = launched_rank()
        if rank == 0:
            complain(error)
        if launched_world_size() > 1:
            from trainer.distributed import leave_together

            if not leave_together() and rank:  # it is this rank's alone
                complain(error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
