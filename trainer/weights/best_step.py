"""The kept checkpoint of a run with the best evaluation, and the weights that had it. Imports no torch."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from trainer.errors import ConfigError
from trainer.report.runs import Run
from trainer.rundir.keys import AVERAGE, LIVE


class BestStep(NamedTuple):
    """The best evaluation by the primary metric at a step with a checkpoint."""

    step: int
    weights: str
    """Name of the weights that had it."""
    text: str
    """The step, its value and the weights, for the user."""
    note: str | None
    """Note for the user if a step without a checkpoint was better."""


def best_step(run: Run, kept: Collection[int], names: Sequence[str] | None = None) -> BestStep | None:
    """Return the best evaluation of the named weights at one of the `kept` steps; of equal ones, the earliest.

    Without `names` it is that of all weights which any session evaluated: the best cell of the report's table.

    None if none of the weights has a finite value at these steps.

    Raises:
        ConfigError: The primary metric has no direction.
    """
    metric = run.primary_metric
    higher = run.higher_is_better(metric)
    if higher is None:
        raise ConfigError(
            f"step=best: {run.path / 'meta.json'} does not declare whether a higher {metric} is better;"
            " expected the number of a step"
        )
    better = max if higher else min
    best_at: dict[int, tuple[float, str]] = {}
    for name in [LIVE, *(f"{AVERAGE}{own}" for own in run.averages)] if names is None else names:
        for step, value in run.evaluation(name.removeprefix(AVERAGE), metric).finite().pairs():
            best_at[step] = better(best_at.get(step, (value, name)), (value, name), key=lambda one: one[0])
    candidates = sorted(best_at.keys() & set(kept))
    if not candidates:
        return None
    best, of_all = (
        better(steps, key=lambda step: best_at[step][0]) for steps in (candidates, sorted(best_at))
    )
    texts = [f"step {step} ({metric} {best_at[step][0]:.5g}, {best_at[step][1]})" for step in (best, of_all)]
    note = None
    if best_at[of_all][0] != best_at[best][0]:
        note = f"step=best: {texts[0]} is the best with a checkpoint; {texts[1]} was better but has none"
    return BestStep(best, best_at[best][1], texts[0], note)
