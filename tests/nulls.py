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
from functools import cached_property, lru_cache
from itertools import combinations

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.simulated import (
    DENSE,
    STEP,
    Array,
    Make,
    forks_of,
    groups,
    one_run_without_gap,
    samples_of,
    seeds_of,
    settings_of,
)
from trainer.report.best_decay import optimum
from trainer.report.comparison import Comparison, combine
from trainer.report.group import Group
from trainer.report.pairs import difference, moments_of
from trainer.report.runs import Run
from trainer.report.statistics import ALPHA, holm
from trainer.report.verdicts import Row, rows_of


class Simulation(list[Run]):
    """Runs of one simulation. What several verdicts need of them is computed once."""

    @cached_property
    def rows(self) -> list[Row]:
        """Scores of all weights, the runs being seeds of one group."""
        return rows_of(Group("all", self), "loss")

    @cached_property
    def comparison(self) -> Comparison:
        """Comparison of the groups that the runs belong to."""
        comparison = combine(self, "loss")
        assert comparison is not None
        return comparison


@lru_cache(maxsize=2)  # one without a difference, and one with a planted one
def simulated(make: Make, shift: tuple[float, ...], times: int, seed: int) -> list[Simulation]:
    """Return so many simulations of the same kind; the verdicts on them share the last ones."""
    random = np.random.default_rng(seed)
    return [Simulation(make(random, np.array(shift))) for _ in range(times)]


def has_winner(runs: Simulation) -> bool:
    """Whether some weights win in their group."""
    return any(row.last.winner for row in runs.rows)


def names_best_average(runs: Simulation) -> bool:
    """Whether exactly one average may be the best."""
    return sum(row.may_be_best for row in runs.rows) == 1


def leaves_out_the_first(runs: Simulation) -> bool:
    """Whether the average 0.9 is called worse than the best."""
    return not next(row for row in runs.rows if row.weights == "0.9").may_be_best


def calls_a_pair_different(runs: Simulation) -> bool:
    """Whether the table of every pair has a verdict on some pair."""
    group = Group("all", runs)
    names = [row.weights for row in runs.rows]
    moments = moments_of(group, "loss", STEP, names)
    assert moments is not None
    return min(holm([difference(moments, *pair).p for pair in combinations(names, 2)])) <= ALPHA


def best_group(runs: Simulation) -> bool:
    """Whether some group is the best of all."""
    return runs.comparison.winner is not None


def answer(runs: Simulation, place: int) -> str:
    """The text of one answer of a comparison: 0 setting, 1 average or live, 2 which average."""
    return runs.comparison.answers[place].text


def names_a_setting(runs: Simulation) -> bool:
    """Whether some setting is called the best."""
    return "not clear" not in answer(runs, 0)


def average_or_live_wins(runs: Simulation) -> bool:
    """Whether the average of the leading setting wins against its live weights, or these against every average."""
    return "not clear" not in answer(runs, 1)


def average_wins_in_each_run(runs: Simulation) -> bool:
    """Whether the average of the leading setting wins in each run or over the seeds."""
    return answer(runs, 1).startswith("the average wins")


def names_an_average(runs: Simulation) -> bool:
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


def misses(runs: Simulation) -> bool:
    """Whether the interval of the optimum misses it."""
    best = optimum(Group("all", runs), runs.rows)
    return best is None or not (best.low or 0) < TRUTH < (best.high or math.inf)


def is_narrow(runs: Simulation) -> bool:
    """Whether the interval of the optimum is narrower than the distance of two tested horizons."""
    best = optimum(Group("all", runs), runs.rows)
    return best is not None and bool(best.through) and (best.high or math.inf) < 3.3 * (best.low or 0)


@dataclass(frozen=True)
class Case:
    """One verdict on one kind of data."""

    verdict: str
    data: str
    make: Make
    null: Array
    """Shifts of the averages without a difference to find; for an optimum, the curve with the true one."""
    is_false: Callable[[Simulation], bool]
    planted: Array
    is_found: Callable[[Simulation], bool]
    make_planted: Make | None = None
    """Maker of the runs with a difference, if it is another one."""

    def rate(self, times: int, *, null: bool, seed: int = 0) -> float:
        """The share of simulations with a false claim, or with the planted difference found."""
        shift, holds = (self.null, self.is_false) if null else (self.planted, self.is_found)
        make = self.make if null or self.make_planted is None else self.make_planted
        return sum(map(holds, simulated(make, tuple(shift.tolist()), times, seed))) / times


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
    for count in (2, 6):
        data, none, planted = f"{count} forks of one run, 2 averages", np.zeros(2), np.full(2, -0.2)
        verdict = "some weights win against live"
        made.append(Case(verdict, data, forks_of(count), none, has_winner, planted, has_winner))
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
            groups,
            np.zeros(2),
            best_group,
            np.full(2, -0.3),
            best_group,
        )
    )
    return made


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
