"""Make averages from stored weights and evaluate them, on any number of ranks."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ema.config import EMAConfig
from launch.evaluating.checkpoint import result_path, without_gradients, write_result
from launch.evaluating.request import Setting
from launch.synthesizing.basis import find_basis
from launch.synthesizing.bench import Bench, solved
from launch.synthesizing.cooldown import checkpoint_of_fork
from launch.synthesizing.exporting import export
from launch.synthesizing.request import Request
from launch.synthesizing.rounding import rounding_of
from launch.synthesizing.trials import Trial, Verdict, cooldown_json, judge, shown, table, to_json
from launch.synthesizing.weights import Stock
from trainer.build import Evaluated, build_evaluated
from trainer.checkpoint.training_state import load_weights
from trainer.config.averages import grown_averages
from trainer.distributed.failures import in_all_processes
from trainer.distributed.processes import Processes, agreeing, meeting, on_main
from trainer.errors import EXIT_DONE, ConfigError
from trainer.evaluation.evaluation import unfit_statistics
from trainer.evaluation.facts import metric_facts
from trainer.report.text.terminal import print_tables
from trainer.rundir.circumstances import versions
from trainer.rundir.directory import RunDir
from trainer.shell.printable import print_text
from trainer.shell.terminal import interrupted_at_once
from trainer.weights.selection import choose_checkpoint


def posthoc(request: Request, setting: Setting) -> int:
    """Make and evaluate the averages in every process, print and write the result on rank 0; return the exit code.

    Raises:
        ConfigError: Bad input found before the ranks connect. Later errors are printed here.
    """
    return in_all_processes(setting.config, lambda processes: _posthoc(request, setting, processes))


def _posthoc(request: Request, setting: Setting, processes: Processes) -> int:
    files = on_main(lambda: _choose_files(request, setting.run_dir), "choosing the files")
    bench = _prepared(request, setting, files, processes)
    made = [(target, solved(bench.basis, target)) for target in request.targets]
    bench.announce()
    with meeting("evaluating"):
        bench.stored()
        if files.cooldown is not None:
            bench.cool_down(*files.cooldown, files.checkpoint)
        for target, synthesis in made:
            bench.make(target, synthesis)
        if request.search:
            bench.search()
    verdict = on_main(
        lambda: judge(bench.trials, higher_is_better=bench.higher_is_better), "choosing the best average"
    )
    exported = on_main(lambda: _exported(request, bench.trials, verdict), "choosing what to export")
    with agreeing("writing the result"):
        if processes.is_main:
            _write(files.out, _result(setting, bench, verdict, processes), bench, verdict)
            if request.export is None:
                bench.show(f"The same command with export=FILE.safetensors writes {shown(exported)}.")
    if request.export is not None:
        export(request.export, bench, exported)
        why = "" if exported == verdict.best.name else ", the average that was named"
        bench.show(f"exported {shown(exported)}{why}: {os.path.relpath(request.export.path)}")
    return EXIT_DONE


@dataclass(frozen=True)
class _Files:
    """Files of a command, chosen by rank 0 before the model is built."""

    checkpoint: Path
    """Checkpoint with the live weights."""
    step: int
    """Its optimizer step."""
    out: Path
    """File for the result."""
    cooldown: tuple[str, Path, int] | None
    """Name of the fork to compare with, its checkpoint, and the step where it begins."""


def _choose_files(request: Request, run_dir: RunDir) -> _Files:
    """Return the files to read and to make.

    Raises:
        ConfigError: A file to read is missing, or one to make exists.
    """
    chosen = choose_checkpoint(run_dir, request.step)
    out = result_path(run_dir, request.out, chosen.step)
    for path in (out.with_suffix(suffix) for suffix in (".png", ".svg")):
        if path == out or path.exists():
            raise ConfigError(
                f"out: {path} is the file of a picture; expected a new name with another suffix"
            )
    if request.export is not None:
        request.export.require_free()
        if request.export.path.absolute() == out.absolute():
            raise ConfigError(f"export: {request.export} is the file of out=; expected another name")
    cooldown = None
    if request.cooldown is not None:
        name = request.cooldown.resolve().name
        cooldown = (name, *checkpoint_of_fork(request.cooldown, run_dir, chosen.step))
    return _Files(chosen.path, chosen.step, out, cooldown)


def _prepared(request: Request, setting: Setting, files: _Files, processes: Processes) -> Bench:
    """Build the model with the live weights, and find the stored weights."""
    config = without_gradients(setting.config)
    with interrupted_at_once():  # parts import packages when they are built
        parts = build_evaluated(config, setting.averages, processes, setting.allowed)
    with agreeing("loading the checkpoint", collectives=True):
        load_weights(files.checkpoint, parts.network.module)
    averages = setting.averages | grown_averages(setting.config)
    basis = find_basis(setting.run_dir, files.step, parts.network.module, request.basis, averages)
    with agreeing("checking the metric"):
        metric, higher = _metric(parts)
    stock = Stock(parts.network.module)
    basis = replace(basis, rounding=rounding_of(basis, stock, parts.network.module))
    show = print_text if processes.is_main else lambda text: None
    made = averages or {"made": EMAConfig()}  # of a run without averages, the buffers of those made are live
    for warning in unfit_statistics(parts.network.module, config.ema.batchnorm_batches, made):
        show(f"warning: {warning}")
    return Bench(parts, stock, basis, metric, higher, show)


def _write(out: Path, result: dict[str, Any], bench: Bench, verdict: Verdict) -> None:
    """Print the table, and write the result and its picture."""
    trials, metric, step = bench.trials, bench.metric, bench.basis.step
    print_tables([table(verdict, trials, metric, step, bench.cooldown)])
    write_result(out, result)
    bench.show(f"written: {os.path.relpath(out)}")
    # Imported here, when the result is on disk: the import of matplotlib takes long, and may fail.
    from launch.synthesizing.picture import draw

    path = out.with_suffix(".png")
    if draw(path, trials, metric, step, higher_is_better=bench.higher_is_better):
        bench.show(f"written: {os.path.relpath(path)} and {path.with_suffix('.svg').name}")


def _exported(request: Request, trials: Sequence[Trial], verdict: Verdict) -> str:
    """Return the name of the weights to export: the only average that was asked for, else the chosen ones.

    Raises:
        ConfigError: The average that was asked for has values of the metric that are not finite.
    """
    if len(request.targets) > 1 or request.search:
        return verdict.best.name
    (target,) = request.targets
    named = next(trial for trial in trials if trial.name == target.name)
    if request.export is not None and not named.values.isfinite().all():
        raise ConfigError(f"export: {shown(target.name)} has values of the metric that are not finite")
    return target.name


def _metric(parts: Evaluated) -> tuple[str, bool]:
    if parts.primary_faults:
        raise ConfigError(parts.primary_faults[0])
    facts = metric_facts(parts.evaluation)
    metric = facts["primary_metric"]
    if metric in facts["direction_undeclared"]:
        raise ConfigError(
            f"task.primary_metric: {metric} has no direction; expected a metric that can be ranked"
        )
    if parts.evaluation.num_samples < 4:
        raise ConfigError("trainer.eval_samples: expected at least 4, two for each half")
    return metric, metric in facts["higher_is_better"]


def _result(setting: Setting, bench: Bench, verdict: Verdict, processes: Processes) -> dict[str, Any]:
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
