"""How often each verdict of a report is wrong, and how often it is found, in simulated runs.

    python -m tests.nulls [--times 1000]

Each line is one verdict on one kind of data. `false` is the share of simulations in which it claims a difference that
does not exist, or leaves out what is true; at most 5 % is allowed. `power` is the share in which it finds a planted
difference. The values of a sample share most of their noise, and averages of neighbouring horizons share more.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from trainer.report.best_decay import optimum
from trainer.report.comparison import combine
from trainer.report.group import Group
from trainer.report.pairs import difference, moments_of
from trainer.report.runs import Run
from trainer.report.statistics import ALPHA, holm
from trainer.report.verdicts import Row, rows_of
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


def rows(runs: list[Run]) -> list[Row]:
    return rows_of(Group("all", runs), "loss")


def has_winner(runs: list[Run]) -> bool:
    """Whether some weights win in their group."""
    return any(row.last.winner for row in rows(runs))


def names_best_average(runs: list[Run]) -> bool:
    """Whether exactly one average may be the best."""
    return sum(row.may_be_best for row in rows(runs)) == 1


def leaves_out_the_first(runs: list[Run]) -> bool:
    """Whether the average 0.9 is called worse than the best."""
    return not next(row for row in rows(runs) if row.weights == "0.9").may_be_best


def calls_a_pair_different(runs: list[Run]) -> bool:
    """Whether the table of every pair has a verdict on some pair."""
    group = Group("all", runs)
    names = [row.weights for row in rows(runs)]
    moments = moments_of(group, "loss", STEP, names)
    assert moments is not None
    return min(holm([difference(moments, *pair).p for pair in combinations(names, 2)])) <= ALPHA


def best_group(runs: list[Run]) -> bool:
    """Whether some group is the best of all."""
    comparison = combine(runs, "loss")
    assert comparison is not None
    return comparison.winner is not None


def answer(runs: list[Run], place: int) -> str:
    """The text of one answer of a comparison: 0 setting, 1 average or live, 2 which average."""
    comparison = combine(runs, "loss")
    assert comparison is not None
    return comparison.answers[place].text


def names_a_setting(runs: list[Run]) -> bool:
    """Whether some setting is called the best."""
    return "not clear" not in answer(runs, 0)


def average_or_live_wins(runs: list[Run]) -> bool:
    """Whether the average of the leading setting wins against its live weights, or these against every average."""
    return "not clear" not in answer(runs, 1)


def average_wins_in_each_run(runs: list[Run]) -> bool:
    """Whether the average of the leading setting wins in each run or over the seeds."""
    return answer(runs, 1).startswith("the average wins")


def names_an_average(runs: list[Run]) -> bool:
    """Whether some average of the leading setting is called the best."""
    return "not clear" not in answer(runs, 2)


TRUTH = 40.0
"""The best horizon of the curves below, between the tested ones."""


def parabola(horizon: Array, truth: float = TRUTH) -> Array:
    return 0.02 * np.log(horizon / truth) ** 2


def lag(exponent: float, noise: float = 1.0) -> Callable[[Array], Array]:
    """Noise that falls with the horizon and a lag that grows with it: the minimum is at TRUTH."""

    def curve(horizon: Array) -> Array:
        h = horizon / TRUTH
        return 0.02 * (h**-noise / noise + h**exponent / exponent - 1 / noise - 1 / exponent)

    return curve


def shifts_of(curve: Callable[[Array], Array], decays: Sequence[float] = DENSE) -> Array:
    return curve(1 / (1 - np.array(decays)))


def misses(runs: list[Run]) -> bool:
    """Whether the interval of the optimum misses it."""
    best = optimum(Group("all", runs), rows(runs))
    return best is None or not (best.low or 0) < TRUTH < (best.high or math.inf)


def is_narrow(runs: list[Run]) -> bool:
    """Whether the interval of the optimum is narrower than the distance of two tested horizons."""
    best = optimum(Group("all", runs), rows(runs))
    return best is not None and bool(best.through) and (best.high or math.inf) < 3.3 * (best.low or 0)


@dataclass(frozen=True)
class Case:
    """One verdict on one kind of data."""

    verdict: str
    data: str
    make: Make
    null: Array
    """Shifts of the averages without a difference to find; for an optimum, the curve with the true one."""
    is_false: Callable[[list[Run]], bool]
    planted: Array
    is_found: Callable[[list[Run]], bool]
    make_planted: Make | None = None
    """Maker of the runs with a difference, if it is another one."""

    def rate(self, times: int, *, null: bool, seed: int = 0) -> float:
        """The share of simulations with a false claim, or with the planted difference found."""
        random = np.random.default_rng(seed)
        shift, holds = (self.null, self.is_false) if null else (self.planted, self.is_found)
        make = self.make if null or self.make_planted is None else self.make_planted
        return sum(holds(make(random, shift)) for _ in range(times)) / times


def cases() -> list[Case]:
    """All verdicts of a report, on one run and on several seeds."""
    made = []
    for data, make, count, step in (
        ("8 samples, 2 averages", samples_of(8), 2, 0.08),
        ("256 samples, 4 averages", samples_of(256), 4, 0.012),
        ("256 samples, 4 averages, gaps only", samples_of(256, paired=False), 4, 0.012),
        ("3 seeds, 2 averages", seeds_of(3), 2, 0.05),
        ("5 seeds, 4 averages", seeds_of(5), 4, 0.025),
    ):
        none, planted = np.zeros(count), np.array([-step] + [0.0] * (count - 1))
        apart = (none, names_best_average, planted, names_best_average)
        worse = (none, leaves_out_the_first, -planted, leaves_out_the_first)
        made += [
            Case("some weights win against live", data, make, none, has_winner, 2 * planted, has_winner),
            Case("one average is the best", data, make, *apart),
            Case("an average is worse than the best", data, make, *worse),
        ]
        if "gaps" not in data:
            different = (none, calls_a_pair_different, planted, calls_a_pair_different)
            made.append(Case("a pair of weights differs", data, make, *different))
    # Two averages are equal and the others far behind: the hardest null of the best average.
    tied = np.array([0.0, 0.0, 1.0, 1.0])
    for data, make in (
        ("256 samples, 2 of 4 equal", samples_of(256)),
        ("5 seeds, 2 of 4 equal", seeds_of(5)),
    ):
        planted = tied + np.array([-0.01, 0.0, 0.0, 0.0]) * (1 if "samples" in data else 3)
        made.append(
            Case("one average is the best", data, make, tied, names_best_average, planted, names_best_average)
        )
    for shape, curve in (
        ("parabola", parabola),
        ("1/h + h", lag(1)),
        ("1/h + h²", lag(2)),
        ("1/√h + h", lag(1, 0.5)),
        ("1/h + √h", lag(0.5)),
        ("1/√h + h²", lag(2, 0.5)),
    ):
        for data, make in (("512 samples", samples_of(512)), ("5 seeds", seeds_of(5))):
            shifts = shifts_of(curve)
            made.append(
                Case("the optimum is here", f"{data}, {shape}", make, shifts, misses, shifts, is_narrow)
            )
    made += _cases_of_settings()
    made.append(
        Case(
            "a group is the best",
            "3 groups of 3 seeds",
            _groups,
            np.zeros(2),
            best_group,
            np.full(2, -0.3),
            best_group,
        )
    )
    return made


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


def _cases_of_settings() -> list[Case]:
    """The answers about several settings: which is best, average or live weights, which average."""
    made = []
    for data, make, count, step in (
        ("3 settings, same 3 seeds, 2 averages", settings_of(3, 3), 2, 0.05),
        ("3 settings, 3 seeds each, 2 averages", settings_of(3, 3, own_seeds=True), 2, 0.05),
        ("6 settings, same 5 seeds, 4 averages", settings_of(6, 5), 4, 0.025),
        ("2 settings of which one is clear, 3 seeds", settings_of(2, 3, apart=0.5), 2, 0.05),
    ):
        none, all_better = np.zeros(count), np.full(count, -step)
        one_better = np.array([-step] + [0.0] * (count - 1))
        found = average_wins_in_each_run
        made += [
            Case("an average or live wins", data, make, none, average_or_live_wins, all_better, found),
            Case(
                "the average of a setting", data, make, none, names_an_average, one_better, names_an_average
            ),
        ]
    for data, null, planted in (
        ("3 settings, same 3 seeds", settings_of(3, 3), settings_of(3, 3, apart=0.1)),
        (
            "3 settings, 3 seeds each",
            settings_of(3, 3, own_seeds=True),
            settings_of(3, 3, apart=0.5, own_seeds=True),
        ),
        ("6 settings, same 5 seeds", settings_of(6, 5), settings_of(6, 5, apart=0.05)),
    ):
        none = np.zeros(2)
        made.append(
            Case("a setting is the best", data, null, none, names_a_setting, none, names_a_setting, planted)
        )
    data, better = "2 settings, 3 seeds, one run without gap", np.full(2, -0.05)
    make, found = one_run_without_gap(3), average_wins_in_each_run
    made.append(
        Case(
            "an average wins in each run",
            data,
            make,
            better,
            found,
            better,
            found,
            settings_of(2, 3, apart=0.5),
        )
    )
    return made


def _groups(random: np.random.Generator, shift: Array) -> list[Run]:
    """Three groups whose averages win; the first group is better by `shift`."""
    return [
        run
        for group in range(3)
        for run in seeds(
            random, 3, (shift if group == 0 else 0 * shift) - 0.5, **{"optimizer.lr": str(group)}
        )
    ]


def main() -> int:
    """Run the simulations, print the table, and return 1 if a rate is too high."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m tests.nulls")
    parser.add_argument("--times", type=int, default=1000)
    times = parser.parse_args().times
    table = Table(
        "verdict", "data", "false, %", "power, %", title=f"verdicts of a report, {times} simulations each"
    )
    too_often = 0
    # A rate of 5 % is exceeded by chance: three standard errors are allowed.
    most = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / times)
    for case in cases():
        false, power = case.rate(times, null=True), case.rate(times, null=False, seed=1)
        too_often += false > most
        table.add_row(case.verdict, case.data, f"{100 * false:.1f}", f"{100 * power:.0f}")
        print(f"\r{case.verdict}: {case.data}", end="\x1b[K", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    Console(width=120).print(table)
    return bool(too_often)


if __name__ == "__main__":
    sys.exit(main())
