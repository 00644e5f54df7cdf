"""Evaluate the best decay between the tracked ones, at each evaluation of a run with `ema.axis`.

The bank has constant decays whose horizons are in ratio 2. A parabola over the logarithm of the horizon, through the
best value and its two neighbours, gives the horizon of the optimum. Its average is a weighted sum of the bank, the
initial weights and the live weights (`ema.posthoc`), which is made in memory, evaluated and discarded.

If the longest horizon is the best one, a longer average may be better. The sign of the slope of the loss from M, the
longest average, towards that of twice the horizon, F, decides. It is a finite difference between two forwards, of M and
of M + STEP (F - M), on the same part of the evaluation samples: a backward would need gradients of the swapped weights
through every sharding and compilation. F is made as above if its predicted error is small. Otherwise F - M is replaced
by M minus the average of half its horizon.

With `ema.axis_grows` the run then adds the average of twice the horizon, which begins with the present weights. Until
it has forgotten them, it is evaluated and serves to make others, but it is no point of the parabola.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ema import EMABank, EMAConfig, ExponentialMovingAverage, divergence
from ema.posthoc import MAX_ERROR, Snapshot, saved_snapshot, solve
from ema.rounding import distances, roundings
from ema.state import canonical
from ema.swap import weights_swapped_into
from trainer.config.averages import INITIAL, SETTLES, axis_name
from trainer.distributed.processes import on_main
from trainer.distributed.sharding import Network
from trainer.evaluation.custom import is_higher_better
from trainer.evaluation.evaluation import Evaluation, paired_gap
from trainer.rundir.keys import LIVE, axis_key, evaluation_key

STEP = 0.5
"""Share of the way to the longer average at which the finite difference is taken."""
SHARE = 0.5
"""Share of the evaluation samples for the finite difference, so that it costs as much as one evaluation.

Measured on digits_noise with banks cut short: 55 of 57 slopes that were clearly not 0 had the sign of the difference
between the two averages, and 6 of 6 longer averages that were called better were better. (With 1/64 of the samples, 41
of 42 and 5 of 6.)"""
CLEAR = 2.0
"""Standard errors from 0 at which a longer average is called better."""

Evaluate = Callable[[Network, Mapping[str, ExponentialMovingAverage]], dict[str, float]]
"""Function that evaluates the live weights and averages and returns the record."""


@dataclass(frozen=True)
class Choice:
    """A horizon and the weighted sum that is its average."""

    horizon: float
    coefficients: Mapping[str, float]
    """Coefficient of each average by name, without those that are 0."""
    live: float = 0.0
    """Coefficient of the live weights."""
    error: float = 0.0
    """Predicted relative error; 0 for weights that are tracked."""


@dataclass
class EvaluationOfAxis:
    """Evaluation of a bank with `ema.axis`, and then of the best decay in between."""

    evaluation: Evaluation
    evaluate: Evaluate
    """Function that evaluates the live weights and the bank."""
    note: Callable[[str], object]
    """Function that shows a line to the user."""
    noted: bool = False
    """Whether this session has named a longer average as better that it does not add."""
    further: Mapping[str, EMAConfig] = field(default_factory=dict)
    """Averages that the run may add to its bank, by name."""
    steps: int = 0
    """Optimizer steps of the run, which bound when an average is added."""

    def __call__(self, network: Network, bank: EMABank) -> dict[str, float]:
        """Evaluate the bank and the best decay; return the record.

        It has `axis/horizon`, `axis/decay`, `axis/predicted_error` and, named by the primary metric, `axis/loss`.
        These are left out before the averages start and without finite values. If the longest horizon is the best one,
        and at most half of the steps so far, the record also has `axis/longer_gap`, the value of the longest average
        minus that of a step towards a longer one, and its standard error.

        If a longer average is clearly better and the run may add it, the bank has it afterwards, updated once.

        Memory: a copy of this rank's part of the averaged tensors, besides that of a swap; an added average.

        Collectives: those of the evaluations and of adding an average, one all-reduce, up to three object broadcasts.
        """
        record = self.evaluate(network, {name: bank[name] for name in bank if name != INITIAL})
        if not all(average.started for average in bank.values()):
            return record
        metric = self.evaluation.task.primary_metric
        higher = bool(is_higher_better(metric, self.evaluation.task, self.evaluation.metrics))
        points, rounding = points_of(bank), rounding_of(bank, network.module)

        def decide() -> tuple[int, float, Choice] | None:
            # The ranks may differ in the last bit of a mean, and so in the best point.
            values = [record.get(evaluation_key(name, metric), math.nan) for _, name in points]
            costs = [(-value if higher else value) if math.isfinite(value) else math.inf for value in values]
            best = min(range(len(points)), key=costs.__getitem__)
            if not math.isfinite(costs[best]):
                return None
            return best, values[best], choose(bank, points, costs, rounding)

        decision = on_main(decide, "choosing a decay")
        if decision is None:
            return record
        best, value, chosen = decision
        if chosen.horizon != points[best][0]:
            value = float(self._values(network, bank, chosen)[metric].mean())
        record |= {
            axis_key("horizon"): chosen.horizon,
            axis_key("decay"): 1 - 1 / chosen.horizon,
            axis_key(metric): value,
            axis_key("predicted_error"): chosen.error,
        }
        if best < len(points) - 1 or not has_forgotten(bank):
            return record
        return record | self._beyond(network, bank, higher, rounding)

    def _beyond(
        self, network: Network, bank: EMABank, higher: bool, rounding: Sequence[float] | None
    ) -> dict[str, float]:
        """Measure whether a longer average is better than the longest; add it or name it if it clearly is."""
        horizon, longest = points_of(bank)[-1]
        towards = on_main(lambda: longer(bank, rounding), "choosing a longer average")
        count = math.ceil(SHARE * self.evaluation.num_samples)
        near, far = (
            self._values(network, bank, choice, (0, count))
            for choice in (Choice(horizon, {longest: 1.0}), towards)
        )
        metric = self.evaluation.task.primary_metric
        if metric not in near:  # it is one of the whole evaluation set
            metric, higher = "loss", False
        gap, error = paired_gap(near[metric], far[metric])
        is_better = (-gap if higher else gap) > CLEAR * error
        added = self._add(network, bank, 2 * horizon, is_better)
        if added or (is_better and not self.noted and axis_name(2 * horizon) not in bank):
            self.noted = self.noted or not added
            begins = f"{axis_name(2 * horizon)} begins now" if added else "a longer run keeps longer averages"
            self.note(
                f"ema.axis: a longer average may be better: the longest, of {horizon:g} steps, is the best of the bank,"
                f" and on the way to {2 * horizon:g} steps {metric} goes {'up' if higher else 'down'} by"
                f" {abs(gap):.2g} ± {error:.1g}; {begins}"
            )
        return {axis_key("longer_gap"): gap, axis_key("longer_gap_se"): error}

    def _add(self, network: Network, bank: EMABank, horizon: float, is_better: bool) -> bool:
        """Add the average of a horizon if it is better and can still forget its first weights; return whether it was.

        The ranks may differ in the last bit of `is_better`, so rank 0 decides.
        """
        name, step = axis_name(horizon), max(average.last_iteration for average in bank.values())
        if name not in self.further or name in bank or step + SETTLES * horizon > self.steps:
            return False
        if not on_main(lambda: is_better, "adding a longer average"):
            return False
        bank.add(network.module, name, self.further[name]).update(network.module, iteration=step)
        return True

    def _values(
        self, network: Network, bank: EMABank, choice: Choice, part: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """Return the metrics of a weighted sum, on all samples of the primary set, or on a part without set metrics."""
        weights = bank.combined(network.module, choice.coefficients, choice.live)
        with weights_swapped_into(network.module, weights):
            self.evaluation.reestimate(network)
            values = self.evaluation.measured(network, part)
            return self.evaluation.of_the_set(values) if part is None else values


def points_of(bank: EMABank) -> list[tuple[float, str]]:
    """Return the tracked horizons in steps with their names, rising in ratio 2; the live weights have horizon 1.

    A longest average that began later than others is left out until it has forgotten its first weights (`SETTLES`).
    """
    points = [(1 / (1 - average.config.decay), name) for name, average in bank.items() if name != INITIAL]
    rows = {name: _row(bank[name]) for _, name in points}
    first = min(row.start for row in rows.values())
    while first < rows[points[-1][1]].start > rows[points[-1][1]].step - SETTLES * points[-1][0]:
        points.pop()
    return [(1.0, LIVE), *points] if points[0][0] == 2 else points


def has_forgotten(bank: EMABank) -> bool:
    """Return whether a longer average than the longest would no longer mostly consist of the initial weights."""
    horizon, longest = points_of(bank)[-1]
    row = _row(bank[longest])
    return row.step - row.start >= 2 * horizon


@torch.no_grad()
def rounding_of(bank: EMABank, model: nn.Module) -> list[float] | None:
    """Return the rounding error of each average and of the live weights in a sum of them, for `ema.posthoc.solve`.

    An element is taken to be wrong by the roundings of its updates, and at least by `eps` of its dtype and of float32,
    in which they are added up. How long a step is, the distance of the shortest average from the live weights shows.
    None if it shows no step.

    Args:
        bank: bank of the run, whose averages have started.
        model: its live model.

    Collectives: an all-reduce.
    """
    shortest, average = next(iter(bank.items()))
    row, summed = _row(average), torch.finfo(torch.float32).eps
    (steps,) = distances([row], [Snapshot(row.step)])
    apart = max(divergence({shortest: average}, model)[shortest].rel_l2, summed)
    if not (steps > 0 and math.isfinite(apart)):
        return None
    trained = {canonical(name) for name, own in model.named_parameters() if own.requires_grad}
    errors = []
    for one, updates in zip(bank.values(), roundings([_row(one) for one in bank.values()]), strict=True):
        # Buffers are copied, often in another dtype.
        dtypes = {tensor.dtype for name, tensor in one.state_dict().items() if name in trained}
        errors.append(max(1.0, updates) * max((torch.finfo(dtype).eps for dtype in dtypes), default=summed))
    return [max(error, summed) * steps / apart for error in (*errors, summed)]


def choose(
    bank: EMABank, points: list[tuple[float, str]], costs: list[float], rounding: Sequence[float] | None
) -> Choice:
    """Return the optimum by the parabola through the best point and its neighbours, or the best point without both.

    Args:
        bank: bank of the run, whose averages have started.
        points: result of `points_of`.
        costs: value of each point, lower is better; infinite where it is not finite.
        rounding: result of `rounding_of`.
    """
    best = min(range(len(points)), key=costs.__getitem__)
    horizon, name = points[best]
    near = costs[max(0, best - 1) : best + 2]
    if len(near) < 3 or not all(map(math.isfinite, near)):
        return Choice(horizon, {}, live=1.0) if name == LIVE else Choice(horizon, {name: 1.0})
    return made(bank, horizon * 2 ** vertex(*near), rounding)


def made(bank: EMABank, horizon: float, rounding: Sequence[float] | None) -> Choice:
    """Return the weighted sum that comes closest to the constant decay of a horizon.

    Args:
        bank: bank of the run, whose averages have started.
        horizon: in steps, above 1.
        rounding: result of `rounding_of`.
    """
    rows = {name: _row(average) for name, average in bank.items()}
    step = max(row.step for row in rows.values())
    config = replace(next(iter(bank.values())).config, decay=1 - 1 / horizon)
    target = Snapshot(step, config, min(row.start for row in rows.values()))
    synthesis = solve([*rows.values(), Snapshot(step)], target, rounding=rounding)
    *coefficients, live = synthesis.coefficients
    return Choice(horizon, dict(zip(rows, coefficients, strict=True)), live, synthesis.error)


def _row(average: ExponentialMovingAverage) -> Snapshot:
    """Return the row of an average without the steps that were skipped: a constant decay does not advance in them."""
    row = saved_snapshot(average.state_dict())
    return replace(row, origin=row.start + row.skipped, skipped=0)


def longer(bank: EMABank, rounding: Sequence[float] | None) -> Choice:
    """Return the weights on the way from the longest average towards that of twice its horizon."""
    (_, half), (horizon, longest) = points_of(bank)[-2:]
    twice = made(bank, 2 * horizon, rounding)
    if twice.error > MAX_ERROR:
        return Choice(2 * horizon, {longest: 1 + STEP, half: -STEP}, error=twice.error)
    mixed = {name: STEP * x + (1 - STEP) * (name == longest) for name, x in twice.coefficients.items()}
    return Choice(2 * horizon, mixed, STEP * twice.live, twice.error)


def vertex(left: float, middle: float, right: float) -> float:
    """Return the place of the minimum of the parabola through values at -1, 0 and 1, within [-1, 1].

    Without a minimum it is the better end.
    """
    curvature = left - 2 * middle + right
    if curvature <= 0:
        return -1.0 if left < right else 1.0
    return min(1.0, max(-1.0, 0.5 * (left - right) / curvature))
