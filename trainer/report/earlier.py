"""Find out whether a run was clearly better at an earlier evaluation than at its last one, as when it overfits.

`pairs.jsonl` pairs the weights of one step, not those of two. So the difference is tested as if the two evaluations had
different samples, each with the spread of the last one. They have the same samples, on which the values of two steps of
one training rise and fall together, and after overfitting the spread has grown: the true error is smaller. That also
pays for the choice of the earlier step among many.
"""

import math
from dataclasses import dataclass

from trainer.report.format import display_name, format_interval, format_value
from trainer.report.runs import Run
from trainer.report.statistics import ALPHA, Estimate
from trainer.rundir.checkpoints import committed, step_of
from trainer.rundir.keys import AVERAGE, LIVE

EVALUATED = ("trainer.eval_samples", "data", "task", "metrics")
"""Beginnings of overrides that change what is evaluated."""


@dataclass(frozen=True)
class Earlier:
    """Weights of an earlier evaluation that are clearly better than all of the last one."""

    step: int
    weights: str
    """Their name as commands take it: `live` or `ema/NAME`."""
    sentence: str
    is_kept: bool
    """Whether the run has a checkpoint of the step."""


def earlier_best(run: Run, metric: str) -> Earlier | None:
    """Return the best weights of all evaluations; None unless they are clearly better than those of the last one.

    None also for a metric without a direction or without a value of each sample, and for a run of which a later session
    changed what is evaluated.
    """
    higher = run.higher_is_better(metric)
    found = [
        (value, step, name)
        for name in (LIVE, *run.averages)
        for step, value in run.evaluation(name, metric).finite().pairs()
    ]
    pairs = run.pairs
    changes = (word.lstrip("+~") for overrides, _ in run.sessions for word in overrides)
    if any(word.startswith(EVALUATED) for word in changes):
        return None
    if higher is None or not found or pairs is None or metric not in pairs.metrics:
        return None
    sign = -1 if higher else 1
    best, step, name = min(found, key=lambda one: (sign * one[0], one[1]))
    at_end = [one for one in found if one[1] == pairs.step and one[2] in pairs.metrics[metric].weights]
    if not at_end or step >= pairs.step:
        return None
    last, _, last_name = min(at_end, key=lambda one: sign * one[0])
    moments = pairs.metrics[metric]
    gap = Estimate(last - best, math.sqrt(2) * moments.contrast({last_name: 1.0})[1], moments.count - 1)
    if not gap.p <= ALPHA:
        return None
    is_kept = any(step_of(path) == step for path in committed(run.path / "checkpoints"))
    checkpoint = (
        f"export its checkpoint with step={step}" if is_kept else "no checkpoint of that step is kept"
    )
    sentence = (
        f"The {metric} has become worse since step {step}: there {display_name(name)} had {format_value(best)}, and"
        f" the best of step {pairs.step} is {display_name(last_name)} with {format_value(last)}, difference"
        f" {format_interval(gap)}; {checkpoint}."
    )
    return Earlier(step, name if name == LIVE else f"{AVERAGE}{name}", sentence, is_kept)
