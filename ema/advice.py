"""Warn of mistakes in the choice of averages for a run of given length, before its first step.

The warnings are computed from the gains (`ema.rules.gain`) at about three hundred iterations of the run. They do not
depend on the names of rules, except that the last gains of `cosine` are 0 by design. So they work for a user's own rule
too. Does not import torch.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ema.config import EMAConfig
from ema.rules import Rule, batches_of, gain

IN_RATIO, EVENLY = 200, 100
"""Number of sampled iterations at equal ratios, and at equal distances."""
A_LITTLE_LOWER: dict[str, Callable[[float], float]] = {
    "decay": lambda decay: max(0.0, decay - max(1e-6 * (1 - decay), 1e-15)),
    "halflife_kimg": lambda life: life * (1 - 1e-6),
}
"""Fields that set how long an average remembers, and a slightly lower value of each.

A warm-up or a ramp may keep such a field from having an effect for a whole run. A field has an effect if the slightly
lower value gives another average."""
LOWEST = {"decay": 0.0, "halflife_kimg": 1e-9}
WHAT_DECIDES = (
    "start_iter",
    "update_every",
    "dtype",
    "include",
    "exclude",
    "track_frozen",
    "average_buffers",
)
"""Fields that decide the values of an average besides the gains. (`mode` and `device` change only where they are.)"""
EPSILON = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23}
"""Distance from 1 to the next larger number, by dtype of the shadow."""
NEGLIGIBLE = {"bfloat16": 0.1, "float16": 0.1, "float32": 0.005}
"""Largest relative distance from its weight at which a shadow may stop moving without a warning, by dtype."""
OLD = 0.25
"""Mean age of an average, as a share of the run, from which it is behind the live weights.

Measured with decays from 0.8 to 0.999 at evaluations every 10 and 20 steps, by the share of significant gaps: in 240
steps of the quickstart every average younger than 12 % of the run won (23 of 23) and none older than 25 % did (0 of
91); in 1000 steps of digits_noise 71 % won up to 12 %, and 1 % above 40 % (1 of 98)."""
YOUNG = 0.1
"""Mean age, as a share of the run, of the average that is suggested instead: that of `warmup` in a short run."""
EVER = 2**40
"""Iterations that count as infinitely many."""


@dataclass(frozen=True)
class _Course:
    """Gains 1 - beta of one average at each iteration of a run."""

    config: EMAConfig
    rule: Rule | None
    seen: int
    """Iterations of the run after the start of the average."""
    gains: dict[int, float]
    """Gain by iteration since the start of the average; empty if there is no update or the user's rule is not given."""


def pitfalls(
    configs: Mapping[str, EMAConfig],
    num_iterations: int,
    *,
    rules: Mapping[str, Rule] | None = None,
    live_dtype: str | None = None,
) -> list[str]:
    """Describe what users may not expect of these averages in a run of this length.

    * Averages that are equal during the whole run, so that a comparison of them is useless.
    * A `decay` or half-life that has no effect in the run, because of a warm-up or a ramp.
    * An average that remembers more iterations than it sees, with the share of the first weights in its final value.
    * Averages that are all so old at the end that they lag behind the live weights, with a key that fits the run.
    * A shadow that does not move, because updates are smaller than half a unit in the last place of its dtype.
    * An average that never starts, or never changes after its start.

    Args:
        configs: settings of the averages by name.
        num_iterations: of the whole run.
        rules: the callable of `config.rule` by name of the average. Without the callable only the start of that average
            is checked.
        live_dtype: dtype of the weights, such as `float32`, for averages whose `dtype` is None.

    Returns:
        One line for each pitfall, which begins with `ema` and the names of the averages.

    Raises:
        ValueError: A setting is not valid, or a user's rule returns a beta outside [0, 1].
    """
    rules = rules or {}
    late: dict[int, list[str]] = {}
    courses: dict[str, _Course] = {}
    for name, config in configs.items():
        config = EMAConfig.of(config)
        config.validate()
        config = _with(config, dtype=config.dtype or live_dtype)
        if config.start_iter >= num_iterations:
            late.setdefault(config.start_iter, []).append(name)
        else:
            courses[name] = _course(config, num_iterations - config.start_iter, rules.get(name))
    lines = [
        f"ema {', '.join(names)}: start_iter={start} is not before the end of {num_iterations} iterations,"
        " so it is equal to the live weights during the whole run"
        for start, names in late.items()
    ]
    return lines + _lines(courses)


def _lines(courses: Mapping[str, _Course]) -> list[str]:
    """Describe the pitfalls of averages that start within the run, one line each."""
    groups = _same(courses)
    lines = [_same_line(names, courses) for names in groups]
    grouped = {name for names in groups for name in names}
    old = {name: found for name, course in courses.items() if (found := _old_age(course)) is not None}
    for name, course in courses.items():
        held_back = None if name in grouped else _held_back(course)
        too_long = _too_long(course)
        # A bank has long averages on purpose: a shorter one of it fits.
        if len(old) == len(courses):
            mean, share = old[name], old[name] / _end(course)
            age = f"its weights are {mean:.0f} iterations old in the mean, {share:.0%} of the run"
            too_long = f"{too_long or age}, so it lags behind the live weights; {_fitting(course)}"
        for line in (held_back, too_long, _stalled(course)):
            if line is not None:
                lines.append(f"ema {name}: {line}")
    return lines


def _course(config: EMAConfig, seen: int, rule: Rule | None) -> _Course:
    if config.rule is not None and rule is None:
        return _Course(config, rule, seen, {})
    times = _times(seen, config.update_every)
    return _Course(config, rule, seen, {t: gain(config, t, rule) for t in times})


def _times(seen: int, every: int) -> list[int]:
    """Return iterations since the start with a due update: the first, the last, and samples between them."""
    last = seen // every
    evenly = (1 + (last - 1) * i // EVENLY for i in range(EVENLY + 1))
    in_ratio = (round(last ** (i / IN_RATIO)) for i in range(IN_RATIO + 1))
    return [every * n for n in sorted({*evenly, *in_ratio})] if last else []


def _equal(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9)


def _same(courses: Mapping[str, _Course]) -> list[list[str]]:
    """Group the names of averages that are equal during the whole run; only groups of two or more."""
    groups: list[list[str]] = []
    for name, course in courses.items():
        for names in groups:
            other = courses[names[0]]
            if all(getattr(course.config, f) == getattr(other.config, f) for f in WHAT_DECIDES) and (
                course.gains and all(_equal(g, other.gains.get(t, math.nan)) for t, g in course.gains.items())
            ):
                names.append(name)
                break
        else:
            groups.append([name])
    return [names for names in groups if len(names) > 1]


def _same_line(names: Sequence[str], courses: Mapping[str, _Course]) -> str:
    first, *others = (courses[name] for name in names)

    def differ(t: int) -> bool:
        mine = gain(first.config, t)
        return any(not _equal(mine, gain(other.config, t)) for other in others)

    line = f"ema {', '.join(names)}: equal during the whole run"
    # A user's rule may fail for iterations after the end of the run, so it is not called with them.
    parting = _first(differ, first) if all(courses[name].rule is None for name in names) else None
    if parting is None:
        return f"{line}; the settings in which they differ never take effect"
    return f"{line}; they differ from iteration {parting} on, and the run has {_end(first)}"


def _held_back(course: _Course) -> str | None:
    for field, lower in A_LITTLE_LOWER.items():
        if not _is_read(course, field) or _in_force(course, field):
            continue
        value = getattr(course.config, field)
        if field == "decay" and value == 1:
            # There is no higher decay. It asks for the plain mean, or for the warm-up alone.
            continue
        at = _first(_matters(course.config, field, lower(value)), course)
        when = "" if at is None else f" (it would from iteration {at} on, and the run has {_end(course)})"
        return f"{field}={value!r} never takes effect{when}; every higher value gives the same average"
    return None


def _is_read(course: _Course, field: str) -> bool:
    """Return whether the rule reads the field. A user's rule is never called with changed settings."""
    return course.rule is None and any(map(_matters(course.config, field, LOWEST[field]), course.gains))


def _in_force(course: _Course, field: str) -> bool:
    lower = A_LITTLE_LOWER[field](getattr(course.config, field))
    return course.rule is None and any(map(_matters(course.config, field, lower), course.gains))


def _matters(config: EMAConfig, field: str, value: float) -> Callable[[int], bool]:
    """Return a function from an iteration to whether `value` of the field would give another gain there."""
    one = _with(config, update_every=1)
    other = _with(one, **{field: value})
    return lambda t: not _equal(gain(one, t), gain(other, t))


def _with(config: EMAConfig, **values: Any) -> EMAConfig:
    return dataclasses.replace(config, **values)


def _first(holds: Callable[[int], bool], course: _Course) -> int | None:
    """Find the first iteration after the run at which `holds` becomes true; None if there is none."""
    every = course.config.update_every
    low = high = max(1, course.seen // every)
    while not holds(every * high):
        low, high = high, 2 * high
        if high > EVER:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(every * middle) else (middle, high)
    return course.config.start_iter + every * high


def _end(course: _Course) -> int:
    return course.config.start_iter + course.seen


def _too_long(course: _Course) -> str | None:
    config, seen = course.config, course.seen
    if not course.gains:
        if seen >= config.update_every:
            return None
        return f"update_every={config.update_every} and it sees {seen} iterations: it stays the first weights"
    one = _with(config, update_every=1)
    if _rises_to_1(course):
        # Its last gains are 0 by design, so that they are no horizon.
        first = _share_of_first(course)
        return f"{first:.0%} of it is still the first weights" if first >= 0.05 else None
    last = gain(one, max(course.gains), course.rule)
    if any(_in_force(course, field) for field in A_LITTLE_LOWER):
        # A debiased average begins as a plain mean; only its limit shows the horizon of its decay.
        last = min(last, gain(one, EVER))
    horizon = 1 / last if last else math.inf
    if horizon <= seen * (1 + 1e-9):
        return None
    first = _share_of_first(course)
    kept = f"; {first:.0%} of it is still the first weights" if first >= 0.005 else ""
    return f"remembers {horizon:.0f} iterations and sees {seen}{kept}"


def _old_age(course: _Course) -> float | None:
    """Return the mean age of the weights at the end, in iterations; None if it is no mistake.

    The age is the sum over t of the share of all weights from before t, which is the product of the decays from t on.
    """
    config, every = course.config, course.config.update_every
    # A decay of 1 asks for the plain mean, and the decay of a cosine rises to 1 by design.
    if (
        not course.gains
        or _rises_to_1(course)
        or not any(_in_force(course, field) for field in A_LITTLE_LOWER)
    ):
        return None
    if config.decay == 1 and _is_read(course, "decay"):
        return None
    times = sorted(course.gains, reverse=True)
    logs = [math.log(max(1 - course.gains[t], 1e-300)) for t in times]
    total, age = logs[0], every * math.exp(logs[0])
    for (after, high), (before, low) in pairwise(zip(times, logs, strict=True)):
        updates, newer = (after - before) / every, math.exp(total)
        total += updates * (low + high) / 2 + (low - high) / 2
        age += every * ((updates + 1) * math.exp(total) + (updates - 1) * newer) / 2
    age += course.seen - times[0]
    return age if age > OLD * _end(course) else None


def _fitting(course: _Course) -> str:
    """Name a key whose value gives an average of the age YOUNG."""
    config, horizon = course.config, YOUNG * _end(course)
    if _is_read(course, "halflife_kimg"):
        life = horizon * math.log(2) * config.batch_size / 1000
        return f"ema.halflife_kimg={life:.2g} fits this run, and so does ema=fraction"
    # The rule raises the decay to a power where the batch size is not the one it was chosen for.
    forgotten = -math.expm1(math.log1p(-min(0.5, 1 / horizon)) / batches_of(config))
    if horizon < 2 or forgotten > 0.5:
        return "ema=warmup fits this run"
    return f"ema.decay={1 - float(f'{forgotten:.1g}'):.12g} fits this run, and so does ema=warmup"


def _rises_to_1(course: _Course) -> bool:
    return course.rule is None and course.config.type == "cosine"


def _share_of_first(course: _Course) -> float:
    """Compute the product of all decays: sum log(beta) between the samples by the trapezoidal rule."""
    if 1 in course.gains.values():
        return 0.0
    every = course.config.update_every
    logs = [(t // every, math.log1p(-g)) for t, g in course.gains.items()]
    total = logs[0][1]
    for (before, low), (after, high) in pairwise(logs):
        total += (after - before) * (low + high) / 2 + (high - low) / 2
    return math.exp(total)


def _stalled(course: _Course) -> str | None:
    dtype = course.config.dtype
    # Of a decay that rises to 1, the last gains may be too small to have an effect: there the average hardly moves.
    early = course.seen / 2 if _rises_to_1(course) else course.seen
    smallest = min((g for t, g in course.gains.items() if g > 0 and t <= early), default=1.0)
    if dtype not in EPSILON:
        return None
    # Rounding removes gain * |live - shadow| if it is below half the distance of two neighbouring numbers.
    near = EPSILON[dtype] / 2 / smallest
    if near <= NEGLIGIBLE[dtype]:
        return None
    better = "float64" if dtype == "float32" else "float32"
    return (
        f"its decay reaches {1 - smallest:.8g}, where a {dtype} shadow does not move towards a weight that differs"
        f" from it by less than {near:.1%}; dtype={better} moves"
    )
