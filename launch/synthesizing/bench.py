"""The evaluation of averages that are made from stored weights, one after the other, and the search of a decay."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ema.config import EMAConfig
from ema.posthoc import Synthesis, Weights
from ema.rules import gain
from launch.synthesizing.basis import Basis
from launch.synthesizing.cooldown import Cooldown
from launch.synthesizing.request import Target
from launch.synthesizing.trials import Trial, shown
from launch.synthesizing.weights import Stock, Synthesized
from trainer.build import Evaluated
from trainer.checkpoint.training_state import load_weights
from trainer.distributed.processes import agreeing, on_main
from trainer.evaluation.axis import vertex
from trainer.rundir.keys import LIVE

RATIO = 2.0
"""Factor between the horizons of a search, before it is refined."""
LONGEST = 0.5
"""Longest horizon of a search, as a share of the steps."""


@dataclass
class Bench:
    """The evaluation of one set of weights after the other."""

    parts: Evaluated
    stock: Stock
    basis: Basis
    metric: str
    """Primary metric, by which the weights are compared."""
    higher_is_better: bool
    show: Callable[[str], object]
    """Function that shows a line to the user."""

    def __post_init__(self) -> None:
        self.trials: list[Trial] = []
        self.averages: dict[str, Synthesized] = {}
        self.warned: set[str] = set()
        self.cooldown: Cooldown | None = None

    def announce(self) -> None:
        """Show what was left out, and the numbers of stored weights and samples."""
        basis, count = self.basis, self.parts.evaluation.num_samples
        for note in basis.notes:
            self.show(f"note: {note}")
        steps = {one.snapshot.step for one in basis.kept}
        kept = f"{len(basis.kept)} stored weights of {len(steps)} steps up to {basis.step}"
        self.show(f"{kept}; {count} samples, halved")

    def stored(self) -> None:
        """Evaluate the live weights and the averages that were kept at this step."""
        for one in self.basis.compared:
            horizon = horizon_of(one.snapshot.config, one.snapshot.step - one.snapshot.start)
            self.evaluate(one.name, Synthesized(self.stock, [one], [1.0]), None, horizon)

    def cool_down(self, name: str, path: Path, begins: int, own: Path) -> None:
        """Evaluate the live weights and buffers of a fork's checkpoint, and load those of the run's `own` again."""
        model = self.parts.network.module
        with agreeing("loading the checkpoint of cooldown=", collectives=True):
            load_weights(path, model)
        values = self.parts.evaluation.evaluate(self.parts.network, reestimate=False)[self.metric]
        with agreeing("loading the checkpoint", collectives=True):
            load_weights(own, model)
        self.cooldown = Cooldown(name, begins, values, self.higher_is_better)
        self.show(f"  cool-down {self.cooldown.name}: {self.metric} {float(values.mean()):.4f}")

    def make(self, target: Target, synthesis: Synthesis) -> Trial:
        """Evaluate the average of a target."""
        horizon = horizon_of(target.config, self.basis.step - self.basis.origin)
        average = Synthesized(self.stock, self.basis.kept, synthesis.coefficients)
        return self.evaluate(target.name, average, synthesis, horizon)

    def evaluate(
        self,
        name: str,
        average: Synthesized,
        synthesis: Synthesis | None,
        horizon: float | None,
        *,
        corrects: bool = False,
    ) -> Trial:
        """Evaluate weights on all samples and show their values."""
        evaluation, network = self.parts.evaluation, self.parts.network
        with average.swapped_into(network.module):
            values = evaluation.evaluate(network, reestimate=reestimates(name))[self.metric]
        trial = Trial(name, values, synthesis, horizon, corrects)
        self.trials.append(trial)
        self.averages[name] = average
        error = "" if synthesis is None else f", predicted error {synthesis.error:.2g}"
        self.show(f"  {shown(name)}: {self.metric} {float(values.mean()):.4f}{error}")
        for warning in [] if synthesis is None else synthesis.warnings:
            if warning not in self.warned:
                self.show(f"    warning: {warning}")
                self.warned.add(warning)
        return trial

    def search(self) -> None:
        """Evaluate constant decays of rising horizons, the optimum between them, and a correction of its lag."""
        sign = -1 if self.higher_is_better else 1
        count = max(1, math.floor(math.log(LONGEST * self.basis.step, RATIO)))
        found = [self._decay(RATIO**number) for number in range(1, count + 1)]
        costs = [_cost(trial, sign) for trial in found]
        place = costs.index(min(costs))
        best, horizon = found[place], RATIO ** (place + 1)
        if 0 < place < count - 1:
            shift = vertex(*costs[place - 1 : place + 2])
            if abs(shift) > 0.05:
                between = self._decay(RATIO ** (place + 1 + shift))
                if _cost(between, sign) < costs[place]:
                    best, horizon = between, RATIO ** (place + 1 + shift)
        elif place:
            self.show("  the longest horizon is the best one: an average of a longer run may be better")
        self._without_lag(best, horizon, sign)

    def _without_lag(self, near: Trial, horizon: float, sign: int) -> None:
        """Evaluate M + a (M - F), where M is the average of this horizon and F one of 8 times the horizon.

        An average lags behind weights that still move, and M - F points along their way. Along it the loss is nearly
        quadratic: three values on half A give the a of the minimum.
        """
        own = self.basis.row(_of_horizon(horizon))
        far = self.basis.row(_of_horizon(8 * horizon, "debiased"))

        def evaluate(a: float, name: str) -> Trial:
            wanted = Weights(self.basis.step, own + a * (own - far))
            synthesis = on_main(lambda: self.basis.closest(wanted), "computing the coefficients")
            average = Synthesized(self.stock, self.basis.kept, synthesis.coefficients)
            return self.evaluate(name, average, synthesis, horizon, corrects=True)

        points = [evaluate(a, f"{near.name} lag {a:g}") for a in (0.5, 1.0)]
        for point in points:  # these only find the best a
            self.trials.remove(point)
            del self.averages[point.name]
        costs = [_cost(trial, sign) for trial in (near, *points)]
        a = 0.5 + 0.5 * vertex(*costs) if all(map(math.isfinite, costs)) else 0.0
        if 0 < a <= 1:
            evaluate(a, f"{near.name} without lag (a={a:.2f})")

    def _decay(self, horizon: float) -> Trial:
        """Evaluate the constant decay of a horizon, unless it was evaluated before."""
        config = _of_horizon(horizon)
        target = Target(f"decay {config.decay:.6g}", config)
        if target.name in self.averages:
            return next(trial for trial in self.trials if trial.name == target.name)
        return self.make(target, solved(self.basis, target))


def solved(basis: Basis, target: Target) -> Synthesis:
    """Return the coefficients of rank 0: those of another processor may differ where the rows hardly do.

    Collectives: an object broadcast.
    """
    return on_main(lambda: basis.solve(target), "computing the coefficients")


def _cost(trial: Trial, sign: int) -> float:
    """Return the mean on half A with the sign that makes less better, the same on every rank; infinite if not finite.

    Collectives: an object broadcast.
    """
    mean = on_main(lambda: trial.mean(0), "comparing the averages")
    return sign * mean if math.isfinite(mean) else math.inf


def horizon_of(config: EMAConfig | None, age: int) -> float | None:
    """Return how many steps an average remembers by its decay after so many steps, or None for other weights."""
    if config is None or age < 1:
        return None
    k = config.update_every
    share = gain(config, max(k, age - age % k)) / k
    return 1 / share if share else None


def _of_horizon(horizon: float, rule: str = "constant") -> EMAConfig:
    return EMAConfig(type=rule, decay=1 - 1 / horizon)


def reestimates(name: str) -> bool:
    """Return whether weights of this name need BatchNorm statistics of their own; the live ones have theirs."""
    return name != LIVE
