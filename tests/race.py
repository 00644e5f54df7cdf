"""How often a race of averages ends with another winner than the full evaluation, and what it costs.

    python -m tests.race [--times 1000]        simulated evaluations of a bank of 10
    python -m tests.race RUN_DIR [...]         replays of the evaluations of a run, and measured times

A replay draws the samples of one evaluation from those that are measured, in a new order. `same` is the share of
evaluations with the same winner as the full one. `tie` is the share with another winner that is worse by less than the
tolerance of the race. `wrong` is the rest; at most 5 % in all races of a run is allowed. `cost` is the number of
samples over that of the live weights alone; a full evaluation of a bank of 10 costs 11.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from trainer.evaluation.race import Race, parts_of
from trainer.report.statistics import ALPHA

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], dict[str, Array]]
"""Function that draws the values of all weights on a number of samples, in a random order."""
RACES = 4
"""Raced evaluations of a run: the quickstart has five, and the last one is full."""


@dataclass(frozen=True)
class Rate:
    """Results of many races."""

    other_winner: float
    """Share with another winner than the full evaluation."""
    clearly_wrong: float
    """Share with a winner that is clearly worse than the best average."""
    cost: float
    """Mean number of samples, over that of the live weights."""


def raced(race: Race, values: Mapping[str, Array]) -> tuple[str, float]:
    """Return the winner of a race, and the samples it takes over those of the live weights."""
    total = len(values["live"])
    names = [name for name in values if name != "live"]
    alive, first, used = names, 0, total
    while first < total:
        end = total if len(alive) == 1 else next(end for end in parts_of(total) if end > first)
        used += len(alive) * (end - first)
        if end < total:
            own = {name: values[name][:end] for name in ("live", *alive)}
            alive = race.survivors(own, total, len(names) - 1)
        first = end
    return min(alive, key=lambda name: float(values[name].mean())), used / total


def rates(draw: Draw, samples: int, times: int, seed: int = 0) -> Rate:
    """Race many times."""
    random, race = np.random.default_rng(seed), Race("loss", False, RACES)
    other = wrong = 0
    costs = []
    for _ in range(times):
        values = draw(random, samples)
        best = min((name for name in values if name != "live"), key=lambda name: float(values[name].mean()))
        winner, cost = raced(race, values)
        loss = float((values[winner] - values[best]).mean())
        tolerance = float((values["live"] - values[winner]).std(ddof=1)) / math.sqrt(samples)
        other, wrong = other + (winner != best), wrong + (loss > tolerance)
        costs.append(cost)
    return Rate(other / times, wrong / times, statistics.fmean(costs))


def planted(kind: str) -> Draw:
    """Simulated losses of a bank of 10: skewed noise of the sample, and a random walk over the averages.

    Args:
        kind: `all equal`, `two equal` (two best ones, the others worse), `one best`, or `heavy tails`, where all are
            equal and a few samples carry most of the differences.
    """
    shift = {
        "two equal": np.array([0.0, 0.0, *[0.1] * 8]),
        "one best": np.array([-0.03, *[0.0] * 9]),
    }.get(kind, np.zeros(10))

    def draw(random: np.random.Generator, samples: int) -> dict[str, Array]:
        shared = random.gamma(4, 0.5, samples)
        steps = random.normal(0, 0.05, (10, samples))
        if kind == "heavy tails":
            steps = random.exponential(0.02, (10, samples)) ** 2 * 20
            steps = random.permuted(steps, axis=0)
        own = shared + steps.cumsum(axis=0) - steps.mean() * np.arange(1, 11)[:, None] + shift[:, None]
        live = shared + random.normal(0, 0.1, samples)
        return {"live": live, **{f"average {place}": row for place, row in enumerate(own)}}

    return draw


def replayed(values: Mapping[str, Array]) -> Draw:
    """Measured losses in a random order."""

    def draw(random: np.random.Generator, samples: int) -> dict[str, Array]:
        chosen = random.permutation(len(values["live"]))[:samples]
        return {name: own[chosen] for name, own in values.items()}

    return draw


class Held:
    """An average of a checkpoint, in memory."""

    started = True

    def __init__(self, weights: dict) -> None:
        self._weights = weights

    @contextmanager
    def swapped_into(self, model) -> Iterator[None]:  # type: ignore[no-untyped-def]
        from ema.swap import weights_swapped_into

        with weights_swapped_into(model, self._weights):
            yield


def measured(run: Path, step: int, samples: int, repeats: int) -> tuple[dict[str, Array], list[float]]:
    """Return the losses of all weights of a checkpoint on `samples` samples, and the times of evaluations.

    Returns:
        Values by name; and over the CPU time of the live weights alone, that of the full evaluation and of the race on
        the samples of the run: medians of interleaved repeats.
    """
    from launch.evaluate import settle
    from launch.evaluating.checkpoint import choose, load
    from launch.evaluating.request import Request
    from trainer.build import build_evaluated
    from trainer.distributed.failures import in_all_processes

    found: dict[str, Array] = {}
    ratios: list[float] = []

    def opened(overrides: list[str], processes):  # type: ignore[no-untyped-def]
        setting = settle(run, overrides)
        parts = build_evaluated(setting.config, setting.averages, processes, setting.allowed)
        stored = load(choose(Request(run, step), setting.run_dir), parts.network.module)
        averages = {}
        for name, average in stored.items():
            with average.swapped_into(parts.network.module):
                averages[name] = Held(
                    {key: own.clone() for key, own in parts.network.module.named_parameters()}
                )
        return parts, averages

    def work(processes) -> int:  # type: ignore[no-untyped-def]
        parts, averages = opened([f"trainer.eval_samples={samples}"], processes)
        found["live"] = parts.evaluation.evaluate(parts.network)["loss"].numpy()
        for name, average in averages.items():
            with average.swapped_into(parts.network.module):
                found[name] = parts.evaluation.evaluate(parts.network)["loss"].numpy()
        if repeats:
            ratios.extend(_times(*opened([], processes), repeats))
        return 0

    setting = settle(run, [])
    in_all_processes(setting.config, work)
    return found, ratios


def _times(parts, averages, repeats: int) -> list[float]:  # type: ignore[no-untyped-def]
    evaluation, network = parts.evaluation, parts.network
    evaluation.race = Race("loss", False, RACES)
    ways = [
        lambda: evaluation.evaluate(network),
        lambda: evaluation(network, averages),
        lambda: evaluation(network, averages, full=False),
    ]
    seconds: list[list[float]] = [[] for _ in ways]
    ways[0]()  # the first forward is slower
    for _ in range(repeats):
        for own, way in zip(seconds, ways, strict=True):
            begin = time.process_time()  # other work on the machine does not count
            way()
            own.append(time.process_time() - begin)
    alone, *others = map(statistics.median, seconds)
    return [other / alone for other in others]


def main() -> int:
    """Race, print the table, and return 1 if the error is too high."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m tests.race")
    parser.add_argument("run", type=Path, nargs="?", help="run directory with checkpoints")
    parser.add_argument("--times", type=int, default=200, help="races of each line")
    parser.add_argument("--steps", default="100,200,300,400,500", help="steps of the checkpoints")
    parser.add_argument("--measured", type=int, default=512, help="samples to measure")
    parser.add_argument("--repeats", type=int, default=3, help="timed evaluations of each kind")
    arguments = parser.parse_args()
    table = Table("evaluation", "samples", "same, %", "tie, %", "wrong, %", "cost", "CPU: full", "CPU: race")
    rows: list[tuple[str, Draw, list[int], list[float]]] = []
    if arguments.run is None:
        kinds = ("all equal", "two equal", "one best", "heavy tails")
        rows = [(kind, planted(kind), [256, 2048], []) for kind in kinds]
    else:
        for step in map(int, arguments.steps.split(",")):
            values, ratios = measured(arguments.run, step, arguments.measured, arguments.repeats)
            rows.append((f"step {step}", replayed(values), [256, arguments.measured], ratios))
    worst = 0.0
    for name, draw, sizes, ratios in rows:
        for samples in sizes:
            rate = rates(draw, samples, arguments.times)
            worst = max(worst, RACES * rate.clearly_wrong)
            figures = [1 - rate.other_winner, rate.other_winner - rate.clearly_wrong, rate.clearly_wrong]
            shown = [f"{ratio:.2f}" for ratio in ratios] if samples == sizes[0] and ratios else ["", ""]
            table.add_row(
                name, str(samples), *(f"{100 * share:.1f}" for share in figures), f"{rate.cost:.2f}", *shown
            )
    Console(width=110).print(table)
    # The bound holds for all races of a run; three standard errors are allowed.
    share = ALPHA / RACES
    return bool(worst / RACES > share + 3 * math.sqrt(share * (1 - share) / arguments.times))


if __name__ == "__main__":
    sys.exit(main())
