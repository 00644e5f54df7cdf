"""Write the headline of a report in a sentence: which weights win, or why there is no winner."""

import math
from collections.abc import Sequence

from trainer.report.format import (
    direction_text,
    display_name,
    format_count,
    format_interval,
    format_test,
    format_value,
    holm_text,
)
from trainer.report.pairs import needed
from trainer.report.runs import Split
from trainer.report.same_samples import SAMPLES
from trainer.report.statistics import ALPHA
from trainer.report.verdicts import Row, Score
from trainer.rundir.keys import LIVE

NO_DIRECTION = "no direction was declared, or the estimate is biased"
"""Why a metric has no winner."""
WOULD_SHOW = "would show a difference of this size (80 % power)"


def headline(
    rows: Sequence[Row], higher_is_better: bool | None, *, split: Split | None = None, disagree: bool = False
) -> str:
    """Name the winner, if there is one, at the last evaluation and at the best evaluation of each seed.

    Args:
        rows: Rows of one group.
        higher_is_better: Direction of the metric; None if no run declares it or the runs disagree.
        split: Split that was evaluated; None if its size is not known.
        disagree: Whether the runs declare different directions.
    """
    if not rows:
        return "No evaluation to compare yet."
    if higher_is_better is None:
        return no_direction_headline(rows[0].metric, disagree=disagree)
    last_step = max(row.last_step for row in rows)
    eligible = [row for row in rows if row.is_eligible]
    if not eligible:
        return f"No winner by {rows[0].metric} at step {last_step}: no value is finite."
    when = f"by {rows[0].metric} ({direction_text(higher_is_better)}) at step {last_step}"
    sentences = [winner_sentence({row.weights: row.last for row in eligible}, when, higher_is_better, split)]
    winner = next((row for row in eligible if row.last.winner), None)
    if winner is not None and winner.weights != LIVE:
        equals = [row for row in eligible if row.may_be_best and row is not winner]
        sentences += _rivals(winner, equals, split)
    best = {row.weights: row.best for row in eligible if row.best is not None}
    if max(row.seeds for row in rows) > 1 and best and not best_is_last(rows):
        sentences.append(winner_sentence(best, "at each seed's own best step", higher_is_better))
    return " ".join(sentences)


def _rivals(winner: Row, equals: Sequence[Row], split: Split | None) -> list[str]:
    """Return a sentence on the `equals`, which may be as good as the winning average; none without other averages."""
    rival = winner.rival
    names = ", ".join(display_name(row.weights) for row in equals)
    if rival is None:
        return [f"Not clearly worse than it: {names}."] if equals else []
    pair = f"{display_name(rival.weights)} - {display_name(winner.weights)}"
    figure = f"{pair} {format_interval(rival.gap)}, {format_test(rival.gap.p, 'unadjusted')}"
    if not equals:
        return [f"It is clearly better than every other average; the least certain: {figure}."]
    enough = ""
    if rival.gap.runs == 1:
        count = needed(rival.gap)
        of_seeds = f"about {format_count(count)} seeds {WOULD_SHOW}"
        enough = f"; {of_seeds if winner.seeds > 1 else _enough(count, split)}"
    return [f"Not clearly worse than it: {names}; the least certain: {figure}{enough}."]


def _enough(count: float, split: Split | None) -> str:
    """Say how many samples are enough, and which setting takes them, or that the split lacks them."""
    text = f"about {format_count(count)} samples"
    if split is not None and count > split.samples:
        key = " (data.eval_fraction, or more data)" if split.by_share else ""
        return f"{text} {WOULD_SHOW}, but the evaluation split has only {split.samples:,}{key}"
    return f"{text} ({SAMPLES}) {WOULD_SHOW}"


def no_direction_headline(metric: str, *, disagree: bool = False) -> str:
    """Explain why a metric without a direction, or with several, has no winner."""
    why = "the runs disagree on whether higher or lower is better" if disagree else NO_DIRECTION
    return f"No winner by {metric}: {why}."


def winner_sentence(
    scores: dict[str, Score], when: str, higher_is_better: bool, split: Split | None = None
) -> str:
    """Name the winner among weights with finite values, or the best ones and their gap if none is clearly best.

    Args:
        scores: Scores by the name of the weights.
        when: Metric and step of the scores, as a part of the sentence.
        higher_is_better: Direction of the metric.
        split: As for `headline`.
    """
    top = (max if higher_is_better else min)(scores, key=lambda name: scores[name].value)
    best, live = scores[top], scores.get(LIVE)
    averages = [name for name in scores if name != LIVE]
    count = len(averages)
    if top == LIVE:
        value = format_value(best.value)
        if not averages:
            return f"Nothing to compare with {when}: {value} live, and no average."
        if best.winner:
            rivals = f"{display_name(averages[0])} is" if count == 1 else f"all {count} averages are"
            return f"The live weights win {when}: {value}, and {rivals} worse."
        rival = display_name(averages[0]) if count == 1 else "at least one average"
        return f"No clear winner {when}: live is best with {value}, but {rival} is not clearly worse."
    against = f" against {format_value(live.value)} live" if live else ""
    gap = f"live - EMA {format_interval(best.gap)}, {format_test(best.p, holm_text(count))}"
    if best.winner:
        return f"{display_name(top)} wins {when}: {format_value(best.value)}{against}; {gap}."
    name = display_name(top)
    text = f"No clear winner {when}: {name} is best with {format_value(best.value)}{against}; {gap}"
    alone = best.sd is None and best.gap is not None and best.gap.runs == 1
    if alone and best.gap and math.isfinite(samples := needed(best.gap, ALPHA / count)):
        text += f"; {_enough(samples, split)}"
    return f"{text}."


def best_is_last(rows: Sequence[Row]) -> bool:
    """Return whether every row is best at its last evaluation."""
    return all(row.best is None or row.best.value == row.last.value for row in rows)
