"""Reproduce published findings about averages of weights at small size, by this project's own commands.

    python -m tests.findings [NAME ...] [--folder findings] [--seeds 0,1,2]

Every run is made once and kept in the folder; a command that was interrupted goes on where it was. All of them take
about an hour on one CPU core.
"""

import argparse
import sys
from pathlib import Path

from tests.findings import digits, gpt
from tests.findings.runs import Runs
from tests.findings.synthesis import synthesis

FINDINGS = {
    "merging": (gpt.merging, "a merge stands for a cool-down (WSM, arXiv:2507.17634)"),
    "cosine": (
        gpt.cosine,
        "a constant rate with an average reaches a cosine (Hägele et al., arXiv:2405.18392)",
    ),
    "width": (gpt.width, "the best width moves with rate and length (Karras et al., arXiv:2312.02696)"),
    "batch": (
        digits.batch,
        "β^κ keeps the average when the batch grows by κ (Busbridge et al., arXiv:2307.13813)",
    ),
    "noise": (digits.noise, "averages resist wrong labels (Morales-Brotons et al., arXiv:2411.18704)"),
    "too_long": (gpt.too_long, "too large a decay loses (all of them)"),
    "synthesis": (
        synthesis,
        "averages from 16 and 32 snapshots of two others (n^-3; tail sums beside plain L2)",
    ),
    "lag": (
        gpt.lag,
        "an average without its lag, M + a (M - F), is better than the best average (this project)",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FINDINGS)}; all by default")
    parser.add_argument("--folder", type=Path, default=Path("findings"))
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    unknown = set(options.names) - set(FINDINGS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: expected of {', '.join(FINDINGS)}")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    runs = Runs(options.folder)
    for name in options.names or FINDINGS:
        find, title = FINDINGS[name]
        print(f"{name}: {title}", flush=True)
        for compared, figures in find(runs, seeds):
            print(f"  {compared}: {figures}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
