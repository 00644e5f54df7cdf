"""Simulated runs: noise of their samples or seeds, and averages that differ from the live weights by given shifts."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.report.runs import Run
from trainer.rundir.columns import Series
from trainer.rundir.pairs import Pairs

Array = NDArray[np.float64]
Make = Callable[[np.random.Generator, Array], list[Run]]
"""Function that makes runs whose averages are worse than the live weights by the given shifts."""

DECADES = (0.9, 0.99, 0.999, 0.9999)
DENSE = (0.9, 0.97, 0.99, 0.997, 0.999)
STEP = 100


def run_of(
    live: float,
    averages: Array,
    errors: Array | None,
    seed: int,
    decays: Sequence[float] = DECADES,
    pairs: Pairs | None = None,
    **settings: str,
) -> Run:
    """A run with one evaluation; gaps as the trainer logs them."""
    logged = {"eval/live/loss": live}
    for place, value in enumerate(averages):
        name = f"{decays[place]:g}"
        logged |= {f"eval/ema/{name}/loss": value, f"eval/gap/{name}/loss": live - value}
        logged |= {f"ema/{name}/decay": decays[place]}
        logged |= {f"eval/gap/{name}/loss_se": math.nan if errors is None else errors[place]}
    columns = {key: Series(np.array([STEP]), np.array([value])) for key, value in logged.items()}
    run = Run(Path(f"run_{seed}"), f"run_{seed}", columns, {}, pairs)
    run.__dict__["settings"] = {"seed": str(seed), **settings}
    return run


def one_run(
    random: np.random.Generator,
    samples: int,
    shift: Array,
    decays: Sequence[float] = DECADES,
    *,
    paired: bool = True,
    noise: float = 0.1,
) -> Run:
    """Losses of `samples`: noise of the sample, skewed as losses are, of the averages together, and of each."""
    shared = random.gamma(4, 0.5, samples)
    live = shared + random.normal(0, noise, samples)
    # A random walk over the averages: neighbours differ least.
    walk = random.normal(0, noise / 2, (len(shift), samples)).cumsum(axis=0)
    averages = shared + walk + random.normal(0, noise / 4, walk.shape) + shift[:, None]
    gaps = live - averages
    errors = gaps.std(axis=1, ddof=1) / math.sqrt(samples)
    values = {"live": live, **{f"{decay:g}": own for decay, own in zip(decays, averages, strict=False)}}
    pairs = Pairs.of(STEP, {"loss": values}) if paired else None
    settings = {"trainer.eval_samples": str(samples)}
    return run_of(float(live.mean()), averages.mean(axis=1), errors, 0, decays, pairs, **settings)


def seeds(
    random: np.random.Generator,
    count: int,
    shift: Array,
    level: float = 0.05,
    decays: Sequence[float] = DECADES,
    **settings: str,
) -> list[Run]:
    """Runs of several seeds, each with its own level, which its averages share."""
    runs = []
    for seed in range(count):
        height = random.normal(2, level)
        live = height + random.normal(0, 0.01)
        averages = height + random.normal(0, 0.01, len(shift)) + shift
        runs.append(run_of(live, averages, np.full(len(shift), 0.001), seed, decays, **settings))
    return runs


def samples_of(samples: int, *, paired: bool = True) -> Make:
    return lambda random, shift: [
        one_run(random, samples, shift, DENSE if len(shift) == len(DENSE) else DECADES, paired=paired)
    ]


def seeds_of(count: int) -> Make:
    return lambda random, shift: seeds(
        random, count, shift, decays=DENSE if len(shift) == len(DENSE) else DECADES
    )


def forks_of(count: int) -> Make:
    """Forks of one run: averages with the noise of the samples, which all share, and as much of their own."""

    def make(random: np.random.Generator, shift: Array) -> list[Run]:
        shared = 2 + random.normal(0, 0.01, len(shift)) + shift
        own = random.normal(0, 0.01, (count, len(shift)))
        settings = {"fork": "base@1", "trainer.eval_samples": "256"}
        errors = np.full(len(shift), 0.01)
        return [run_of(2, shared + own[fork], errors, fork, **settings) for fork in range(count)]

    return make


def settings_of(
    settings: int, count: int, *, apart: float = 0.0, level: float = 0.05, own_seeds: bool = False
) -> Make:
    """Settings whose runs differ by noise of the samples, with its standard error 0.01; the averages share none.

    Args:
        settings: number of settings.
        count: seeds of each.
        apart: by how much the first setting is better.
        level: spread of the levels over seeds, which the settings share unless they have `own_seeds`.
        own_seeds: whether each setting has its own seeds.
    """

    def make(random: np.random.Generator, shift: Array) -> list[Run]:
        runs = []
        levels = random.normal(2, level, (settings, count) if own_seeds else count) * np.ones((settings, 1))
        for (setting, seed), height in np.ndenumerate(levels):
            live = height + random.normal(0, 0.007) - apart * (setting == 0)
            averages = live + random.normal(0, 0.01, len(shift)) + shift
            errors, name = np.full(len(shift), 0.01), seed + count * setting * own_seeds
            more = {"optimizer.lr": str(setting), "trainer.eval_samples": "256"}
            runs.append(run_of(live, averages, errors, int(name), DECADES, **more))
        return runs

    return make


def one_run_without_gap(count: int) -> Make:
    """Two settings, of which the first has averages far better in all runs but one: the hardest null of every run."""
    ordinary = settings_of(2, count, apart=0.5)

    def make(random: np.random.Generator, shift: Array) -> list[Run]:
        return [*ordinary(random, np.zeros(len(shift)))[:1], *ordinary(random, shift)[1:]]

    return make


def groups(random: np.random.Generator, shift: Array) -> list[Run]:
    """Three groups whose averages win; the first group is better by `shift`."""
    return [
        run
        for group in range(3)
        for run in seeds(
            random, 3, (shift if group == 0 else 0 * shift) - 0.5, **{"optimizer.lr": str(group)}
        )
    ]
