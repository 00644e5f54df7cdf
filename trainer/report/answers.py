"""Answer the questions of a comparison of settings, each in one sentence with its figure.

*Which setting is best?* The best weights of the leading setting are compared with the best weights of each other one,
over the seeds: by the paired t-test if both have the same seeds, else by Welch's test. Choosing the best weights within
the leading setting is paid for by Bonferroni. A setting that beats all others passes every one of these tests, so
each is done at ALPHA without further adjustment, although the setting was chosen because it looked best (S. Gutmann and
Z. Maymin, "Is the selected population the best?", Ann. Statist. 15, 1987). If one test fails, the settings that may be
the best are those that are not worse at level ALPHA / number of other settings. With one seed there is no test,
because the variation over seeds is unknown.

*Does its average beat its live weights?* This question has an answer of its own, whether or not the first has one: by
the paired gaps over the seeds, or, more modestly, in each run by its samples. A claim about every run needs every one
of its tests, each at ALPHA / number of averages.

*Which average?* Those of the leading setting, as in a single setting (`trainer.report.verdicts`).

The leading setting is chosen by the same values. So the tests of the second and third question are adjusted for the
number of settings that may be the best, which is 1 once the first question is settled.

*How many more seeds?* As many as show a difference of the size seen with 80 % power at the level of its test. Forks of
one run are no further seeds, however many.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.errors import listed
from trainer.report.format import (
    direction_text,
    display_name,
    format_count,
    format_interval,
    format_mean,
    format_test,
    holm_text,
)
from trainer.report.group import Group
from trainer.report.pairs import needed
from trainer.report.statistics import ALPHA, Estimate, paired_estimate, welch_estimate
from trainer.report.verdicts import BETTER, WORSE, Row, verdict
from trainer.rundir.keys import LIVE

MAX_NAMED = 3
"""Most settings or averages that an answer lists by name."""
SPREAD_SEEDS = 2
"""Further seeds of a setting that has one, whose spread over seeds is unknown."""
NO_SPREAD = "one seed shows no spread over seeds, so it may be chance"
NO_TEST = "the difference has no spread over seeds, so it is not tested"


@dataclass(frozen=True)
class Answer:
    """What the records say on one question."""

    question: str
    text: str
    """One sentence without its final stop."""
    more_seeds: float = 0.0
    """Further seeds that may settle the question: 0 if it is settled, NaN if unknown, without a spread over seeds."""

    def __str__(self) -> str:
        return f"{self.question}: {self.text}."


@dataclass(frozen=True)
class Rival:
    """Another setting, by its best weights."""

    group: Group
    row: Row
    gap: Estimate
    """The leading setting minus this one."""
    seeds: int
    """Seeds of the setting that has fewer."""
    p: float
    """p-value, adjusted for the choice of the leading weights."""


@dataclass(frozen=True)
class Leader:
    """The setting whose best weights have the best value, and how it compares with the others."""

    group: Group
    row: Row
    rows: Sequence[Row]
    """All rows of the setting that take part in the decision."""
    rivals: Sequence[Rival]
    higher: bool
    tests: int
    """Number of weights from which the best ones were chosen, also those without a last value."""

    @property
    def is_clear(self) -> bool:
        """Whether the setting is clearly the best."""
        return all(rival.p <= ALPHA for rival in self.rivals)

    @property
    def equals(self) -> list[Rival]:
        """The settings that may be as good, the closest one first."""
        if self.is_clear:
            return []
        count = len(self.rivals)
        possible = [rival for rival in self.rivals if not rival.p * count <= ALPHA]
        return sorted(possible, key=lambda rival: (not math.isnan(rival.p), -rival.p))

    @property
    def fewest_seeds(self) -> int:
        """Seeds of the setting that has fewest, among those that may be the best."""
        return min([self.row.seeds, *(rival.seeds for rival in self.equals)])


def leader_of(groups: Sequence[Group], rows: Sequence[Sequence[Row]], higher: bool) -> Leader | None:
    """Return the leading one of the settings by the rows of each; None if no value is finite."""
    eligible = [[row for row in own if row.is_eligible] for own in rows]
    candidates = [(place, row) for place, own in enumerate(eligible) for row in own]
    if not candidates:
        return None
    place, best = (max if higher else min)(candidates, key=lambda candidate: candidate[1].last.value)
    tests = len(rows[place])
    rivals = [
        _rival(group, own, groups[place], best, tests, higher)
        for group, own in zip(groups, eligible, strict=True)
        if group is not groups[place] and own
    ]
    return Leader(groups[place], best, eligible[place], rivals, higher, tests)


def _rival(other: Group, rows: Sequence[Row], group: Group, best: Row, tests: int, higher: bool) -> Rival:
    """Compare the leading weights with the best row of another group."""
    row = (max if higher else min)(rows, key=lambda own: own.last.value)
    ours, theirs = _value_per_seed(group, best), _value_per_seed(other, row)
    shared = [seed for seed in ours if seed in theirs]
    if len(shared) == len(ours) == len(theirs):
        gap = paired_estimate(np.array([ours[seed] - theirs[seed] for seed in shared]))
    else:
        gap = welch_estimate(np.array(list(ours.values())), np.array(list(theirs.values())))
    return Rival(other, row, gap, min(len(ours), len(theirs)), _adjusted(gap.p, tests))


def _adjusted(p: float, tests: int) -> float:
    """Return a p-value times a number of tests, at most 1; NaN stays NaN."""
    return min(p * tests, 1.0)


def _value_per_seed(group: Group, row: Row) -> dict[str, float]:
    evaluations = group.evaluations(row.metric)
    column = int(np.searchsorted(evaluations.steps, row.last_step))
    values = evaluations.values[row.weights][:, column]
    return {
        seed: float(value) for seed, value in zip(group.seeds, values, strict=True) if not np.isnan(value)
    }


def answers_of(leader: Leader) -> list[Answer]:
    """Answer every question about the leading setting; the last answer is the number of further seeds.

    Its `more_seeds` is 0 unless the spread over seeds is unknown.
    """
    answers = [_best_setting(leader), _against_live(leader), _which_average(leader)]
    unknown = leader.fewest_seeds < 2 and any(answer.more_seeds for answer in answers)
    further = Answer("More seeds", _further(answers, leader), SPREAD_SEEDS if unknown else 0.0)
    return [*answers, further]


def _best_setting(leader: Leader) -> Answer:
    row = leader.row
    question = f"Best setting by {row.metric} ({direction_text(leader.higher)})"
    name = f"{leader.group.short_name}, {format_mean(row.last)} with {display_name(row.weights)}"
    if not leader.rivals:
        return Answer(question, f"{name}; no other setting has a finite value")
    if leader.is_clear:
        closest = max(leader.rivals, key=lambda rival: rival.p)
        return Answer(question, f"{name}; the least certain is {_rival_text(closest, leader.tests)}")
    closest, *further = leader.equals
    if math.isnan(closest.p):
        why = NO_SPREAD if leader.fewest_seeds < 2 else NO_TEST
        return Answer(question, f"not clear; {name} leads, but {why}", math.nan)
    more = max(_more(rival.gap, leader.tests, rival.seeds) for rival in leader.equals)
    others = _names(rival.group.short_name for rival in further)
    also = f" and to {others}" if others else ""
    text = f"not clear; {name} leads, not clearly to {_rival_text(closest, leader.tests)}{also}"
    return Answer(question, text, more)


def _rival_text(rival: Rival, tests: int) -> str:
    value = f"{format_mean(rival.row.last)} with {display_name(rival.row.weights)}"
    test = format_test(rival.p, f"Bonferroni, {tests} weights" * (tests > 1))
    gap = f"difference {format_interval(rival.gap)}, {test}, {rival.seeds} seeds"
    return f"{rival.group.short_name} ({value}; {gap})"


def _settings_text(settings: int) -> str:
    """Name the adjustment for the choice of the setting; empty if it is settled."""
    return f"× {settings} settings that may be best" if settings > 1 else ""


def _against_live(leader: Leader) -> Answer:
    question = f"Average or live weights of {leader.group.short_name}"
    averages = [row for row in leader.rows if row.weights != LIVE and row.last.gap is not None]
    live = next((row for row in leader.rows if row.weights == LIVE), None)
    if not averages:
        return Answer(question, "no average to compare with the live weights")
    if live is None:
        return Answer(question, "the live weights have no finite value to compare with")
    settings = 1 + len(leader.equals)
    best = (max if leader.higher else min)(averages, key=lambda row: row.last.value)
    p = _adjusted(best.last.p, settings)
    found = verdict(best.last.gap, p, leader.higher)
    values = f"{display_name(best.weights)}, {format_mean(best.last)}, against {format_mean(live.last)} live"
    unit = f"{best.seeds} seeds" if best.seeds > 1 else "the samples of one run"
    if best.last.gap is not None and best.last.gap.runs > 1:
        unit = f"the samples and the {best.last.gap.runs} runs of one seed"
    test = format_test(p, holm_text(len(averages)), _settings_text(settings))
    figure = f"live - EMA {format_interval(best.last.gap)}, {test} over {unit}"
    if found == BETTER:
        return Answer(question, f"the average wins; {values}; {figure}")
    if all(verdict(row.last.gap, settings * row.last.p, leader.higher) == WORSE for row in averages):
        return Answer(question, f"the live weights win against every average; {values}; {figure}")
    more = math.nan
    if best.seeds > 1 and best.last.gap is not None and not math.isnan(best.last.gap.p):
        more = _more(best.last.gap, len(averages) * settings, best.seeds)
    p_values = _p_in_each_run(leader, best)
    largest = max(p_values, default=math.inf) * len(averages) * settings
    if largest <= ALPHA:
        tests = f"Bonferroni, {len(averages)} averages" * (len(averages) > 1)
        test = format_test(largest, "over their samples", tests, _settings_text(settings))
        each = f"the average wins in each of {len(p_values)} runs, the largest {test}"
        return Answer(question, f"{each}; {values}; for new seeds it is open: {figure}", more)
    return Answer(question, f"not clear; {values}; {figure}", more)


def _p_in_each_run(leader: Leader, row: Row) -> list[float]:
    """Return the p-value of the gap of each run over its samples; [] if one is missing or not better."""
    evaluations = leader.group.evaluations(row.metric)
    column = int(np.searchsorted(evaluations.steps, row.last_step))
    samples = leader.group.runs[0].eval_samples(row.metric)
    columns = evaluations.run_gaps[row.weights][:, column], evaluations.run_errors[row.weights][:, column]
    gaps = [Estimate(float(gap), float(error), samples - 1) for gap, error in zip(*columns, strict=True)]
    p_values = [gap.p for gap in gaps if (gap.mean > 0) != leader.higher and not math.isnan(gap.p)]
    return p_values if len(p_values) == len(leader.group.sources(row.weights)) else []


def _which_average(leader: Leader) -> Answer:
    question = f"Which average of {leader.group.short_name}"
    averages = [row for row in leader.rows if row.weights != LIVE]
    if not averages:
        return Answer(question, "none was evaluated")
    best = (max if leader.higher else min)(averages, key=lambda row: row.last.value)
    name, rival = display_name(best.weights), best.rival
    if len(averages) == 1:
        return Answer(question, f"{name} is the only one")
    equals = [row for row in averages if row.may_be_best and row is not best]
    settings = 1 + len(leader.equals)
    if rival is None or math.isnan(rival.gap.p):
        return Answer(question, f"not clear; {name} leads, without a test against the others", math.nan)
    p = _adjusted(rival.gap.p, settings)
    test = format_test(p, _settings_text(settings) or "unadjusted")
    pair = f"{display_name(rival.weights)} - {name} {format_interval(rival.gap)}, {test}"
    if not equals and p <= ALPHA:
        text = f"{name} is clearly better than every other average; the least certain: {pair}"
        return Answer(question, text)
    others = _names(display_name(row.weights) for row in equals) or display_name(rival.weights)
    more = _more(rival.gap, settings, best.seeds) if best.seeds > 1 else math.nan
    text = f"not clear; {name} leads, not clearly to {others}; the least certain: {pair}"
    return Answer(question, text, more)


def _more(gap: Estimate, tests: int, seeds: int) -> float:
    """Return how many seeds must be added to show a difference of this size in one of several tests."""
    return max(1.0, needed(gap, ALPHA / tests, seeds) - seeds)


def _further(answers: Sequence[Answer], leader: Leader) -> str:
    """Return how many seeds each open question takes."""
    what = ("the best setting", "average or live weights", "which average")
    open_ones = [
        (answer.more_seeds, name) for answer, name in zip(answers, what, strict=True) if answer.more_seeds
    ]
    if not open_ones:
        return "none; nothing is open"
    if any(group.has_forks for group in (leader.group, *(rival.group for rival in leader.equals))):
        return "more forks show no spread over seeds; new trainings from the start with other seeds would"
    if leader.fewest_seeds < 2:
        return f"{SPREAD_SEEDS} more seeds of each setting would show the spread over seeds"
    finite = sorted((more, name) for more, name in open_ones if not math.isnan(more))
    texts = [f"{format_count(more)} more seed{'s'[: more != 1]} for {name}" for more, name in finite]
    known = f"about {', '.join(texts)} (80 % power, from the spread seen)" if texts else ""
    without = ", ".join(name for more, name in open_ones if math.isnan(more))
    unknown = f"unknown for {without}, because there is no spread over seeds" if without else ""
    return "; ".join(filter(None, (known, unknown)))


def _names(names: Iterable[str]) -> str:
    return listed(list(names), MAX_NAMED)
