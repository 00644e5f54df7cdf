"""A training step of the trainer against the same step written by hand, on the device."""

import argparse
import logging
import sys
import warnings

from tests.benchmarks.bench_step import HAND, LIGHTNING, LOGGING, SMALL, TRAINER, all_sides, measure
from tests.benchmarks.rounds import Spread, ratio
from tests.gpu.figures import figure


def main(device: str) -> None:
    """Print the ratios for the model of the quickstart and for a small one."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    rounds = argparse.Namespace(rounds=20 if device == "cuda" else 2, steps=10)
    sizes = {"quickstart": (), "small": SMALL} if device == "cuda" else {"small": SMALL}
    for size, overrides in sizes.items():
        with all_sides([*overrides, f"trainer.device={device}"], leave_out=(LIGHTNING,)) as sides:
            times = measure(sides, rounds)
        wall = {name: [time.wall for time in own] for name, own in times.items()}
        for name, own in wall.items():
            figure(f"step/{size}/{name}", round(1e3 * Spread.of(own).median, 3), "ms")
        for name in (TRAINER, LOGGING):
            figure(f"step/{size}/{name} over {HAND}", str(ratio(wall[name], wall[HAND])), "x")


if __name__ == "__main__":
    main(sys.argv[1])
