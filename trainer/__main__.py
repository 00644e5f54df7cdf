"""`python -m trainer`: one run, in this process or in all that torchrun started.

Exit codes: 0 done, 2 bad input, 75 stopped by a signal after saving (the same run goes on with `resume=RUN_DIR`).
"""

import sys

from trainer.cli import importing, run_command


def main() -> int:
    """Run the command line of this process and return its exit code."""

    def work() -> int:
        from trainer.config.compose import compose

        composed, overrides = compose()
        with importing():  # torch is imported here, after --help and --cfg were answered
            from trainer.run import run

        return run(composed, overrides)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
