"""A training step of the trainer against the same step written by hand, on the device."""

import argparse
import importlib.util
import logging
import sys
import warnings

from tests.benchmarks.bench_ema_figures import milliseconds
from tests.benchmarks.bench_step import HAND, LIGHTNING, SMALL, all_sides, measure
from tests.benchmarks.rounds import ratio
from tests.gpu.figures import figure

FUSED = "+optimizer.args.fused=true"
"""For all of them; with any other optimizer the trainer's step waits for the device."""


def main(device: str, part: str) -> None:
    """Print times and ratios for the model of the quickstart and for a small one."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    leave_out = () if importlib.util.find_spec("lightning") else (LIGHTNING,)
    real = device == "cuda"
    rounds = argparse.Namespace(rounds=20 if real else 2, steps=10)
    for size, overrides in {"small": SMALL, **({"quickstart": ()} if real else {})}.items():
        with all_sides([*overrides, f"trainer.device={device}", FUSED], leave_out) as sides:
            times = measure(sides, rounds)
        wall = {name: [time.wall for time in own] for name, own in times.items()}
        for name, own in wall.items():
            figure(f"{part}/{size}/{name}", milliseconds(own), "ms")
        for name in wall:
            if name != HAND:
                figure(f"{part}/{size}/{name} over {HAND}", ratio(wall[name], wall[HAND]), "x")


if __name__ == "__main__":
    main(*sys.argv[1:])
