"""Make averages from stored weights and evaluate them, on any number of ranks."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ema.config import EMAConfig
from ema.posthoc import Synthesis
from ema.rules import gain
from launch.evaluating.checkpoint import result_path, without_gradients, write_result
from launch.evaluating.request import Setting
from launch.synthesizing.basis import Basis, find_basis
from launch.synthesizing.cooldown import Cooldown, checkpoint_of_fork
from launch.synthesizing.exporting import export, provenance
from launch.synthesizing.request import Request, Target
from launch.synthesizing.trials import Trial, Verdict, cooldown_json, judge, shown, table, to_json
from launch.synthesizing.weights import Stock, Synthesized
from trainer.build import Evaluated, build_evaluated
from trainer.checkpoint.training_state import load_weights
from trainer.config.averages import grown_averages
from trainer.distributed.failures import in_all_processes
from trainer.distributed.processes import Processes, agreeing, meeting, on_main
from trainer.errors import EXIT_DONE, ConfigError
from trainer.evaluation.axis import vertex
from trainer.evaluation.facts import metric_facts
from trainer.report.text.terminal import print_tables
from trainer.rundir.circumstances import versions
from trainer.rundir.keys import LIVE
from trainer.shell.printable import print_text
from trainer.weights.selection import choose_checkpoint

RATIO = 2.0
"""Factor between the horizons of a search, before it is refined."""
LONGEST = 0.5
"""Longest horizon of a search, as a share of the steps."""


def posthoc(request: Request, setting: Setting) -> int:
    """Make and evaluate the averages in every process, print and write the result on rank 0; return the exit code.

    Raises:
        ConfigError: Bad input found before the ranks connect. Later errors are printed here.
    """
    return in_all_processes(setting.config, lambda processes: _posthoc(request, setting, processes))


def _posthoc(request: Request, setting: Setting, processes: Processes) -> int:
    run_dir = setting.run_dir
    chosen = on_main(lambda: choose_checkpoint(run_dir, request.step), "choosing the checkpoint")
    out = on_main(lambda: result_path(run_dir, request.out, chosen.step), "choosing the file of the result")
    on_main(lambda: _check_pictures(out), "choosing the files of the picture")
    if request.export is not None:
        on_main(request.export.require_free, "looking for the file to export")
    fork = request.cooldown
    left = on_main(
        lambda: None if fork is None else checkpoint_of_fork(fork, run_dir, chosen.step),
        "finding the cool-down",
    )
    parts = build_evaluated(without_gradients(setting.config), setting.averages, processes, setting.allowed)
    with agreeing("loading the checkpoint", collectives=True):
        load_weights(chosen.path, parts.network.module)
    averages = setting.averages | grown_averages(setting.config)
    basis = find_basis(run_dir, chosen.step, parts.network.module, request.basis, averages)
    with agreeing("checking the metric"):
        metric, higher = _metric(parts)
    made = [(target, _solved(basis, target)) for target in request.targets]
    show = print_text if processes.is_main else lambda text: None
    for note in basis.notes:
        show(f"note: {note}")
    steps = sorted({one.snapshot.step for one in basis.kept})
    count = parts.evaluation.num_samples
    show(
        f"{len(basis.kept)} stored weights of {len(steps)} steps up to {basis.step}; {count} samples, halved"
    )
    bench = _Bench(parts, basis, metric, show)
    with meeting("evaluating"):
        bench.stored()
        if fork is not None and left is not None:
            bench.cool_down(fork, *left, chosen.path)
        for target, synthesis in made:
            bench.make(target, synthesis)
        if request.search:
            bench.search(higher)
    _publish(request, setting, processes, bench, out, higher)
    return EXIT_DONE


def _check_pictures(out: Path) -> None:
    for path in (out.with_suffix(suffix) for suffix in (".png", ".svg")):
        if path == out or path.exists():
            raise ConfigError(
                f"out: {path} is the file of a picture; expected a new name with another suffix"
            )


def _publish(
    request: Request, setting: Setting, processes: Processes, bench: "_Bench", out: Path, higher: bool
) -> None:
    """Choose the best average, print the table, write the result and its picture, and export if that is asked.

    Collectives: an object broadcast, an object all-gather and those of `export`.
    """
    verdict = on_main(lambda: judge(bench.trials, higher_is_better=higher), "choosing the best average")
    step = bench.basis.step
    with agreeing("writing the result"):
        if processes.is_main:
            print_tables([table(verdict, bench.trials, bench.metric, step, bench.cooldown)])
            write_result(out, _result(setting, bench, verdict, processes))
            bench.show(f"written: {os.path.relpath(out)}")
            if request.export is None:
                bench.show(
                    f"The same command with export=FILE.safetensors writes {shown(verdict.best.name)}."
                )
            _draw(bench, out.with_suffix(".png"), higher)
    if request.export is not None:
        best = bench.averages[verdict.best.name]
        export(request.export, bench.parts, best, provenance(step, verdict.best.name, best))
        bench.show(f"exported {shown(verdict.best.name)}: {os.path.relpath(request.export.path)}")


def _draw(bench: "_Bench", path: Path, higher: bool) -> None:
    from launch.synthesizing.picture import draw  # matplotlib takes longer to import than the table to make

    trials, step = bench.trials, bench.basis.step
    if draw(path, trials, bench.metric, step, higher_is_better=higher):
        bench.show(f"written: {os.path.relpath(path)} and {path.with_suffix('.svg').name}")


def _metric(parts: Evaluated) -> tuple[str, bool]:
    facts = metric_facts(parts.evaluation)
    metric = facts["primary_metric"]
    if metric in facts["direction_undeclared"]:
        raise ConfigError(
            f"task: {metric} has no direction or is biased; expected a metric that can be ranked"
        )
    if parts.evaluation.num_samples < 4:
        raise ConfigError("trainer.eval_samples: expected at least 4, two for each half")
    return metric, metric in facts["higher_is_better"]


@dataclass
class _Bench:
    """The evaluation of one set of weights after the other."""

    parts: Evaluated
    basis: Basis
    metric: str
    show: Callable[[str], object]

    def __post_init__(self) -> None:
        self.trials: list[Trial] = []
        self.averages: dict[str, Synthesized] = {}
        self.warned: set[str] = set()
        self.stock = Stock(self.parts.network.module)
        self.cooldown: Cooldown | None = None

    def stored(self) -> None:
        """Evaluate the live weights and the averages that were kept at this step."""
        for one in self.basis.compared:
            horizon = horizon_of(one.snapshot.config, one.snapshot.step - one.snapshot.start)
            self.evaluate(one.name, Synthesized(self.stock, [one], [1.0]), None, horizon)

    def cool_down(self, fork: Path, path: Path, begins: int, own: Path) -> None:
        """Evaluate the live weights and buffers of a fork's checkpoint, and load those of the run's `own` again."""
        model = self.parts.network.module
        with agreeing("loading the checkpoint of cooldown=", collectives=True):
            load_weights(path, model)
        values = self.parts.evaluation.evaluate(self.parts.network, reestimate=False)[self.metric]
        with agreeing("loading the checkpoint", collectives=True):
            load_weights(own, model)
        self.cooldown = Cooldown(fork.resolve().name, begins, values)
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
            values = evaluation.evaluate(network, reestimate=name != LIVE)[self.metric]
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

    def search(self, higher: bool) -> None:
        """Evaluate constant decays of rising horizons, the optimum between them, and a correction of its lag."""
        sign = -1 if higher else 1
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
        assert near.synthesis is not None
        own, far = near.synthesis, _solved(self.basis, Target("far", _of_horizon(8 * horizon, "debiased")))

        def evaluate(a: float, name: str) -> Trial:
            coefficients = [
                (1 + a) * x - a * y for x, y in zip(own.coefficients, far.coefficients, strict=True)
            ]
            error = math.hypot((1 + a) * own.error, a * far.error)
            amplification = sum(map(abs, coefficients))
            condition, warnings = max(own.condition, far.condition), own.warnings
            synthesis = Synthesis(coefficients, error, amplification, condition, warnings)
            average = Synthesized(self.stock, self.basis.kept, coefficients)
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
        return self.make(target, _solved(self.basis, target))


def _solved(basis: Basis, target: Target) -> Synthesis:
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


def _result(setting: Setting, bench: _Bench, verdict: Verdict, processes: Processes) -> dict[str, Any]:
    """Return the content of the result file."""
    return {
        "run": setting.run_dir.path.name,
        "config_sha256": setting.run_dir.meta["config_sha256"],
        "step": bench.basis.step,
        "metric": bench.metric,
        "num_samples": bench.parts.evaluation.num_samples,
        "best": verdict.best.name,
        "not_clearly_worse": verdict.may_be_best,
        "averages": {trial.name: to_json(trial, verdict) for trial in bench.trials},
        **({} if bench.cooldown is None else {"cooldown": cooldown_json(bench.cooldown, bench.trials)}),
        "overrides": setting.overrides,
        "world_size": processes.world_size,
        "versions": versions(),
    }
