"""The races of a run with `trainer.eval_policy=race`: which averages were eliminated, when, and on how many samples."""

from collections import defaultdict
from dataclasses import dataclass

from trainer.report.runs import Run
from trainer.rundir.keys import raced, raced_samples_key


@dataclass(frozen=True)
class Race:
    """An evaluation that was a race."""

    step: int
    samples: dict[str, int]
    """Number of samples of each average, also of those that were not eliminated."""
    eliminated: frozenset[str]
    """Averages without a value at this step."""


def races_of(run: Run, metric: str) -> list[Race]:
    """Return the races of a run by increasing step, which `metric` decides; [] without any."""
    samples: dict[int, dict[str, int]] = defaultdict(dict)
    eliminated: dict[int, set[str]] = defaultdict(set)
    for name in raced(run.columns):
        evaluated = set(run.evaluation(name, metric).steps.tolist())
        for step, count in run.series(raced_samples_key(name)).pairs():
            samples[step][name] = int(count)
            if step not in evaluated:
                eliminated[step].add(name)
    return [Race(step, samples[step], frozenset(eliminated[step])) for step in sorted(samples)]


def races_note(run: Run, metric: str, last_step: int) -> list[str]:
    """Describe the last race before `last_step`, and what the races mean for the other columns; [] without any."""
    races = [race for race in races_of(run, metric) if race.step < last_step and race.eliminated]
    if not races:
        return []
    last = races[-1]
    after: dict[int, list[str]] = defaultdict(list)
    for name in last.samples:
        if name in last.eliminated:
            after[last.samples[name]].append(name)
    parts = [f"{', '.join(after[count])} after {count}" for count in sorted(after)]
    others = f"; {len(races)} such races are in the report" if len(races) > 1 else ""
    return [
        f"Raced at step {last.step}, EMA eliminated after samples: {'; '.join(parts)}{others}. An average has no value,"
        " and no best, where it was eliminated."
    ]
