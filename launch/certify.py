"""`python -m launch.certify RUN_DIR`: check the promises of this project on the user's own model and machine."""

import math
import sys
from collections.abc import Sequence

from launch.certifying.request import STEPS, TOLERANCE, Request
from launch.cli import LONGEST_VALUE, command, parse_count, split_run_dir
from launch.evaluate import settle
from trainer.cli import ending, importing
from trainer.config.own_code import CERTIFIED
from trainer.distributed.torchrun import launched_world_size
from trainer.errors import ConfigError

HELP = """\
Check on this machine what a run of this project promises, with a few steps of the run's model and data.

usage: python -m launch.certify RUN_DIR [steps=4] [tolerance=1e-5] ['allow_targets=[my_package.]']

  RUN_DIR         a run directory; the command reads its configuration, works in a folder inside it that is removed at
                  the end, and writes RUN_DIR/certificate.json
  steps=4         steps of each short run, at least 2
  tolerance=1e-5  largest difference between sharded and unsharded weights, relative to the largest change of a weight
  'allow_targets=[my_package.]'  trusts a package of your own that the run's configuration names

checks:
  sharded = unsharded         two ranks on the CPU and one process give the same weights and averages, but for rounding
  resumed = uninterrupted     a run that is stopped in the middle and continued has the same state bit for bit
  exported = evaluated        an exported average has the checkpoint's tensors bit for bit and the run's evaluation
  realised weights = profile  each average gives every step the weight that its rule states
  merge = formula             a merge of checkpoints is the sum with its coefficients, rounded once

The short runs begin with new weights; init_from, loggers, callbacks and metrics of your own are left out. Averages
start early in them; the check of the profile has each average's own start and interval.
Exit codes: 0 all checks are ok or skipped, 1 a check failed, 2 bad input.

example:
  python -m launch.certify outputs/mine
"""
KEYS = ("steps", "tolerance", "allow_targets")
"""Keys of the command line."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    return command(arguments, HELP, lambda: _certify(arguments))


def _certify(arguments: Sequence[str]) -> int:
    request = parse(arguments)
    with importing():  # importing torch takes seconds, so bad arguments are refused before
        from launch.certifying.certificate import certify
    return certify(request)


def parse(arguments: Sequence[str]) -> Request:
    """Return the parsed command line.

    Raises:
        ConfigError: An argument is invalid, or the path is no run directory.
    """
    if launched_world_size() > 1:
        raise ConfigError("certify: expected one process, got torchrun with several")
    run_dir, own = split_run_dir(arguments, KEYS)
    steps = parse_count("steps", own.get("steps", str(STEPS)))
    if steps < 2:
        raise ConfigError("steps: expected at least 2, because a run is stopped in the middle, got 1")
    trusted = [f"allow_targets={own['allow_targets']}"] if "allow_targets" in own else []
    tolerance = _parse_tolerance(own.get("tolerance", str(TOLERANCE)))
    return Request(settle(run_dir, trusted, groups=CERTIFIED), steps, tolerance)


def _parse_tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise ConfigError(f"tolerance: expected a number in (0, 1), got {text[:LONGEST_VALUE]!r}")
    return value


if __name__ == "__main__":
    sys.exit(ending(lambda: main(sys.argv[1:])))
