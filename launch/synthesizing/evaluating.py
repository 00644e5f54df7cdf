"""Make averages from stored weights and evaluate them, on any number of ranks."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ema.config import EMAConfig
from ema.posthoc import Synthesis
from launch.evaluating.checkpoint import result_path, without_gradients, write_result
from launch.evaluating.request import Setting
from launch.synthesizing.basis import Basis, find_basis
from launch.synthesizing.exporting import export, provenance
from launch.synthesizing.request import Request, Target
from launch.synthesizing.trials import Trial, judge, shown, table, to_json
from launch.synthesizing.weights import Synthesized
from trainer.build import Evaluated, build_evaluated
from trainer.checkpoint.training_state import load_weights
from trainer.config.compose import freeze_config
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
    frozen = freeze_config(setting.config)
    return in_all_processes(
        setting.config.trainer, frozen, lambda processes: _posthoc(request, setting, processes)
    )


def _posthoc(request: Request, setting: Setting, processes: Processes) -> int:
    run_dir = setting.run_dir
    chosen = on_main(lambda: choose_checkpoint(run_dir, request.step), "choosing the checkpoint")
    out = on_main(lambda: result_path(run_dir, request.out, chosen.step), "choosing the file of the result")
    if request.export is not None:
        on_main(request.export.require_free, "looking for the file to export")
    parts = build_evaluated(without_gradients(setting.config), processes, setting.allowed)
    with agreeing("loading the checkpoint", collectives=True):
        load_weights(chosen.path, parts.network.module)
        basis = find_basis(run_dir, chosen.step, parts.network.module, request.basis)
    with agreeing("checking the metric"):
        metric, higher = _metric(parts)
        made = [(target, basis.solve(target)) for target in request.targets]
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
        for target, synthesis in made:
            bench.evaluate(target.name, Synthesized(basis.kept, synthesis.coefficients), synthesis)
        if request.search:
            bench.search(higher)
    verdict = judge(bench.trials, higher_is_better=higher)
    with agreeing("writing the result"):
        if processes.is_main:
            print_tables([table(verdict, bench.trials, metric, basis.step)])
            write_result(out, _result(setting, bench, verdict.best.name, verdict.may_be_best, processes))
            show(f"written: {os.path.relpath(out)}")
    if request.export is not None:
        facts = provenance(basis, verdict.best)
        export(request.export, parts.network.module, bench.averages[verdict.best.name], facts)
        show(f"exported {shown(verdict.best.name)}: {os.path.relpath(request.export.path)}")
    return EXIT_DONE


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

    def stored(self) -> None:
        """Evaluate the live weights and the averages that were kept at this step."""
        for one in self.basis.compared:
            self.evaluate(one.name, Synthesized([one], [1.0]), None)

    def evaluate(
        self, name: str, average: Synthesized, synthesis: Synthesis | None, *, corrects: bool = False
    ) -> Trial:
        """Evaluate weights on all samples and show their values."""
        evaluation, network = self.parts.evaluation, self.parts.network
        with average.swapped_into(network.module):
            again = name != LIVE and evaluation.statistics_batches is not None
            values = evaluation.evaluate(network, reestimate=again)[self.metric]
        trial = Trial(name, values, synthesis, corrects)
        self.trials.append(trial)
        self.averages[name] = average
        error = "" if synthesis is None else f", predicted error {synthesis.error:.2g}"
        self.show(f"  {shown(name)}: {self.metric} {float(values.mean()):.4f}{error}")
        for warning in [] if synthesis is None else synthesis.warnings:
            self.show(f"    warning: {warning}")
        return trial

    def search(self, higher: bool) -> None:
        """Evaluate constant decays of rising horizons, the optimum between them, and a correction of its lag."""
        sign = -1 if higher else 1
        count = max(1, math.floor(math.log(LONGEST * self.basis.step, RATIO)))
        found = [self._decay(RATIO**number) for number in range(1, count + 1)]
        best = min(range(count), key=lambda place: sign * found[place].mean(0))
        horizon = RATIO ** (best + 1)
        if 0 < best < count - 1:
            values = (sign * found[place].mean(0) for place in (best - 1, best, best + 1))
            shift = vertex(*values)
            if abs(shift) > 0.05:
                between = self._decay(RATIO ** (best + 1 + shift))
                if sign * between.mean(0) < sign * found[best].mean(0):
                    horizon = RATIO ** (best + 1 + shift)
        elif best:
            self.show("  the longest horizon is the best one: an average of a longer run may be better")
        self._without_lag(horizon, sign)

    def _without_lag(self, horizon: float, sign: int) -> None:
        """Evaluate M + a (M - F), where M is the average of this horizon and F one of 8 times the horizon.

        An average lags behind weights that still move, and M - F points along their way. Along it the loss is nearly
        quadratic: three values on half A give the a of the minimum.
        """
        near = self.basis.solve(Target("near", _of_horizon(horizon)))
        far = self.basis.solve(Target("far", _of_horizon(8 * horizon, "debiased")))

        def evaluate(a: float, name: str) -> Trial:
            coefficients = [
                (1 + a) * x - a * y for x, y in zip(near.coefficients, far.coefficients, strict=True)
            ]
            error = math.hypot((1 + a) * near.error, a * far.error)
            amplification = sum(map(abs, coefficients))
            condition, warnings = max(near.condition, far.condition), near.warnings
            synthesis = Synthesis(coefficients, error, amplification, condition, warnings)
            return self.evaluate(name, Synthesized(self.basis.kept, coefficients), synthesis, corrects=True)

        decay = f"decay {1 - 1 / horizon:.6g}"
        points = [evaluate(a, f"{decay} lag {a:g}") for a in (0.0, 0.5, 1.0)]
        for point in points:  # these only find the best a
            self.trials.remove(point)
        values = [sign * point.mean(0) for point in points]
        a = 0.5 + 0.5 * vertex(*values)
        if 0 < a <= 1:
            evaluate(a, f"{decay} without lag (a={a:.2f})")

    def _decay(self, horizon: float) -> Trial:
        target = Target(f"decay {1 - 1 / horizon:.6g}", _of_horizon(horizon))
        synthesis = self.basis.solve(target)
        return self.evaluate(target.name, Synthesized(self.basis.kept, synthesis.coefficients), synthesis)


def _of_horizon(horizon: float, rule: str = "constant") -> EMAConfig:
    return EMAConfig(type=rule, decay=1 - 1 / horizon)


def _result(
    setting: Setting, bench: _Bench, best: str, may_be_best: list[str], processes: Processes
) -> dict[str, Any]:
    """Return the content of the result file."""
    return {
        "run": setting.run_dir.path.name,
        "config_sha256": setting.run_dir.meta["config_sha256"],
        "step": bench.basis.step,
        "metric": bench.metric,
        "num_samples": bench.parts.evaluation.num_samples,
        "best": best,
        "not_clearly_worse": may_be_best,
        "averages": {trial.name: to_json(trial) for trial in bench.trials},
        "overrides": setting.overrides,
        "world_size": processes.world_size,
        "versions": versions(),
    }
