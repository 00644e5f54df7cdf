"""Evaluation of the weights of a checkpoint, in every process, with the trainer's own evaluation.

Neither an optimizer nor the run's averages are built. Each average is read from the checkpoint just before its own
evaluation, by the names of its tensors. So its rule and settings are not needed, and only one is in memory at a time.
"""

import dataclasses
import datetime
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ema.state import COUNTERS, RULE, Counters, own_names
from ema.swap import empty_weights, published_names, weights_swapped_into
from launch.evaluating.request import Request, Setting
from trainer.build import Evaluated, build_evaluated
from trainer.checkpoint.store import load_checkpoint, stored_tensors
from trainer.checkpoint.training_state import BATCHNORM, load_weights
from trainer.config.averages import grown_averages
from trainer.config.eval_sets import part_of_the_data
from trainer.config.schema import Config
from trainer.distributed.failures import in_all_processes
from trainer.distributed.processes import Processes, agreeing, meeting, on_main
from trainer.errors import EXIT_DONE, ConfigError
from trainer.evaluation.evaluation import unfit_statistics
from trainer.evaluation.facts import metric_facts
from trainer.evaluation.first_forward import refuse_typed
from trainer.report.comparison import combine
from trainer.report.format import display_name
from trainer.report.headline import headline
from trainer.report.runs import Run
from trainer.report.text.brief import other_metrics
from trainer.report.text.table import Line, Table, row_cells, row_headers, row_notes
from trainer.report.text.terminal import print_tables
from trainer.report.verdicts import rows_of
from trainer.rundir.circumstances import versions
from trainer.rundir.columns import Series
from trainer.rundir.directory import RunDir
from trainer.rundir.files import check_own_folder, write_exclusively
from trainer.rundir.keys import AVERAGE, GAP, LIVE, metric_of
from trainer.rundir.pairs import Pairs
from trainer.shell.printable import print_text
from trainer.shell.terminal import interrupted_at_once
from trainer.weights.selection import choose_checkpoint, choose_weights


@dataclass(frozen=True)
class Choice:
    """Weights to evaluate and file for the result, chosen by rank 0 before the model is built."""

    checkpoint: Path
    step: int
    """Optimizer step of the checkpoint."""
    live: bool
    """Whether the live weights are evaluated."""
    averages: list[str]
    """Names of the averages to evaluate, without `ema/`."""
    out: Path
    note: str | None
    """Note for the user on the choice of the checkpoint."""
    has_statistics: bool
    """Whether the checkpoint has the BatchNorm statistics with which the run evaluated its averages."""


@dataclass(frozen=True, eq=False)
class StoredAverage:
    """Average in a checkpoint, whose tensors are read each time it is swapped in."""

    checkpoint: Path
    """Committed checkpoint, which these ranks have verified by an earlier load."""
    name: str
    stored: Mapping[str, torch.Tensor]
    """Meta tensors of the average (shape and dtype) by their keys."""
    names: Mapping[str, str]
    """Names of the model's tensors by the same keys."""
    statistics: Mapping[str, torch.Tensor]
    """Meta tensors of its re-estimated BatchNorm buffers by the names of the model."""
    started: bool
    """Whether the average had been updated at least once."""

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """Replace the live weights by the average within the context; tensors that it does not track stay live.

        Collectives: those of `load_checkpoint`. Memory: the shards of the average and of a copy of the live weights.

        Raises:
            ConfigError: The checkpoint cannot be read.
        """
        weights = empty_weights(model, {self.names[key]: tensor for key, tensor in self.stored.items()})
        statistics = empty_weights(model, self.statistics)
        state = {key: weights[self.names[key]] for key in self.stored}
        parts = {"ema": {self.name: state}, BATCHNORM: {self.name: statistics}}
        load_checkpoint(self.checkpoint, parts, verified=True)
        with weights_swapped_into(model, weights | statistics):
            yield


def evaluate(request: Request, setting: Setting) -> int:
    """Evaluate in every process, print and write the result on rank 0, and return the exit code.

    Raises:
        ConfigError: Bad input found before the ranks connect. Later errors are printed here.
    """
    return in_all_processes(setting.config, lambda processes: _evaluate(request, setting, processes))


def _evaluate(request: Request, setting: Setting, processes: Processes) -> int:
    choice = on_main(lambda: choose(request, setting.run_dir), "choosing the checkpoint")
    config = without_gradients(setting.config)
    if choice.has_statistics:  # those of the run, whatever the number of processes and the data are now
        config = dataclasses.replace(config, ema=dataclasses.replace(config.ema, batchnorm_batches=0))
    with interrupted_at_once():  # parts import packages when they are built
        parts = build_evaluated(config, setting.averages, processes, setting.allowed)
        refuse_typed(parts.primary_faults, setting.overrides)
    with agreeing("loading the checkpoint", collectives=True):
        averages = load(choice, parts.network.module)
    not_started = [name for name, average in averages.items() if not average.started]
    evaluated = [LIVE] * choice.live + [f"ema/{name}" for name in averages if name not in not_started]
    if processes.is_main:
        if choice.note:
            print_text(f"note: {choice.note}")
        for name in not_started:
            print_text(f"ema/{name} had not started at step {choice.step}: left out")
        if evaluated:
            counts = [part_of_the_data(parts.evaluation.num_samples, len(parts.splits.eval), config.data)]
            counts += [f"{own.num_samples} samples of {name}" for name, own in parts.evaluation.sets.items()]
            print_text(f"step {choice.step}: evaluating {', '.join(evaluated)} on {' and '.join(counts)}")
        if (changed := data_note(setting.overrides)) is not None:
            print_text(f"note: {changed}")
        settings = setting.averages | grown_averages(config)
        bare = [name for name, average in averages.items() if average.started and not average.statistics]
        copying = {name: settings[name] for name in bare if name in settings}
        unfit = unfit_statistics(parts.network.module, config.ema.batchnorm_batches, copying)
        for warning in (*parts.splits.warnings, *unfit):
            print_text(f"warning: {warning}")
    with agreeing("choosing the weights"):
        if not evaluated:
            names = ", ".join(request.weights)
            raise ConfigError(f"weights: none of {names} had started at step {choice.step}")
    kept: list[Pairs] = []
    with meeting("evaluating"):
        keep = kept.append if processes.is_main else None
        record = parts.evaluation(parts.network, averages, live=choice.live, step=choice.step, keep=keep)
    with agreeing("writing the result"):
        if processes.is_main:
            facts = metric_facts(parts.evaluation)
            print_tables(tables_of(setting.run_dir, kept[0], record, facts, setting.overrides))
            result = result_of(setting, choice, parts, processes, evaluated, not_started, record)
            result |= kept[0].to_json()
            write_result(choice.out, result)
            print_text(f"written: {os.path.relpath(choice.out)}")
    return EXIT_DONE


def choose(request: Request, run_dir: RunDir) -> Choice:
    """Return the requested checkpoint, its weights to evaluate and a file for the result, without reading tensors.

    Raises:
        ConfigError: The checkpoint or the weights do not exist, or the result cannot be written.
    """
    chosen = choose_checkpoint(run_dir, request.step, request.weights)
    checkpoint, step = chosen.path, chosen.step
    names = choose_weights(chosen.patterns, chosen.averages)
    out = result_path(run_dir, request.out, step)
    averages = [name.removeprefix(AVERAGE) for name in names if name != LIVE]
    has_statistics = any(key.startswith(f"{BATCHNORM}/") for key in stored_tensors(checkpoint))
    return Choice(checkpoint, step, LIVE in names, averages, out, chosen.note, has_statistics)


def result_path(run_dir: RunDir, out: Path | None, step: int) -> Path:
    """Return the file for the result of an evaluation: `out`, or a new one in the run's `evaluations/`.

    Raises:
        ConfigError: The file exists, or its folder cannot be written.
    """
    now = datetime.datetime.now(datetime.UTC)
    out = out or run_dir.evaluations / f"{now:%Y-%m-%d_%H-%M-%S}_step-{step}_{secrets.token_hex(3)}.json"
    check_own_folder(run_dir.evaluations)
    if out.exists():
        raise ConfigError(f"out: expected a new file, but {out} exists already")
    folder = next(folder for folder in out.parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"out: {folder} cannot be written; choose another file with out=FILE")
    return out


def without_gradients(config: Config) -> Config:
    """Return the configuration without DDP, whose gradient buckets would be as large as the model."""
    if config.sharding.strategy != "ddp":
        return config
    return dataclasses.replace(config, sharding=dataclasses.replace(config.sharding, strategy="none"))


def load(choice: Choice, model: nn.Module) -> dict[str, StoredAverage]:
    """Load the live weights into the model and return the averages to evaluate, with their counters loaded.

    Collectives: those of `load_weights`.

    Raises:
        ConfigError: The checkpoint does not fit the model or is damaged.
    """
    counters = {name: {COUNTERS: Counters().to_tensor()} for name in choice.averages}
    loaded = load_weights(choice.checkpoint, model, {"ema": counters})
    stored, model_names = stored_tensors(choice.checkpoint), published_names(model)
    averages = {}
    for name in choice.averages:
        own = _below(f"ema/{name}/", stored)
        tensors = {key: tensor for key, tensor in own.items() if key not in (COUNTERS, RULE)}
        names = own_names(tensors, model_names)
        statistics = _below(f"{BATCHNORM}/{name}/", stored)
        unexpected = [f"ema/{name}/{key}" for key in tensors if names[key] not in model_names]
        unexpected += [f"{BATCHNORM}/{name}/{key}" for key in statistics if key not in model_names]
        if unexpected:
            raise ConfigError(f"{choice.checkpoint} has {unexpected[0]}, but the model has no such tensor")
        try:
            started = Counters.from_tensor(loaded["ema"][name][COUNTERS]).started
        except ValueError as error:
            raise ConfigError(f"{choice.checkpoint} is damaged: {error}") from error
        averages[name] = StoredAverage(choice.checkpoint, name, tensors, names, statistics, started)
    return averages


def _below(prefix: str, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the stored tensors whose keys begin with `prefix`, by the rest of their keys."""
    return {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}


def data_note(overrides: Sequence[str]) -> str | None:
    """Return a warning if settings below `data` were changed, because training samples may now be evaluated.

    Returns None if the run's data settings are unchanged or `data` was replaced as a whole.
    """
    keys = [override.partition("=")[0].lstrip("+~") for override in overrides]
    changed = [key for key in keys if key.startswith("data.")]
    if not changed or "data" in keys:
        return None
    return f"{', '.join(changed)}: these samples may include samples that the run was trained on"


def tables_of(
    run_dir: RunDir,
    pairs: Pairs,
    record: Mapping[str, float],
    facts: Mapping[str, Any],
    overrides: Sequence[str],
) -> list[Table]:
    """Return the tables of an evaluation.

    With gaps to the live weights: one table by the primary metric, and one with a line for each other metric. Without
    gaps: one table for each metric.

    Args:
        run_dir: Directory of the evaluated run.
        pairs: Step of the checkpoint, and what paired comparisons need.
        record: Result of `trainer.evaluation.evaluation.Evaluation`.
        facts: Metric facts of the evaluation's task, which may differ from the run's task.
        overrides: Changes to the run's configuration, for the titles.
    """
    step = pairs.step
    columns = {key: Series(np.array([step]), np.array([number])) for key, number in record.items()}
    run = Run(run_dir.path, run_dir.path.name, columns, dict(facts), pairs)
    names = dict.fromkeys(metric for key in record if (metric := metric_of(key)) is not None)
    metrics = sorted(names, key=lambda name: name != run.primary_metric)
    if not any(key.startswith(GAP) for key in record):
        return [_table(run, metric, step, overrides) for metric in metrics]
    comparisons = [combine([run], metric) for metric in metrics]
    others = other_metrics([comparison for comparison in comparisons if comparison is not None])
    return [_table(run, metrics[0], step, overrides), *others]


def _table(run: Run, metric: str, step: int, overrides: Sequence[str]) -> Table:
    rows, higher = rows_of(run, metric), run.higher_is_better(metric)
    lines = []
    for row in rows:
        cells, keys = row_cells(row, step)
        # The further cells are on the best step, and there is only one step here.
        lines.append(Line([display_name(row.weights), *cells[:4]], [row.weights, *keys[:4]], row.last.winner))
    headers = ["weights", *row_headers(f"{run.with_unit(metric)} at step {step}", rows)[:4]]
    compared = any(row.last.gap is not None for row in rows)
    summary = headline(rows, higher, split=run.split(metric)) if compared else ""
    notes = row_notes(rows, higher)[:2] if compared else []
    changes = [
        override for override in overrides if override.lstrip("+").partition("=")[0] != "allow_targets"
    ]
    return Table(" ".join([f"{run.name}: {metric}", *changes]), headers, lines, summary, notes)


def result_of(
    setting: Setting,
    choice: Choice,
    parts: Evaluated,
    processes: Processes,
    evaluated: list[str],
    not_started: list[str],
    record: Mapping[str, float],
) -> dict[str, Any]:
    """Return the content of the result file: metrics named as in `metrics.jsonl`, and the evaluation's settings."""
    return {
        "run": setting.run_dir.path.name,
        "config_sha256": setting.run_dir.meta["config_sha256"],
        "step": choice.step,
        "weights": evaluated,
        "not_started": [f"ema/{name}" for name in not_started],
        "metrics": {key: number if math.isfinite(number) else None for key, number in record.items()},
        "num_samples": parts.evaluation.num_samples,
        "overrides": setting.overrides,
        "world_size": processes.world_size,
        "sharding": setting.config.sharding._target_ or setting.config.sharding.strategy,
        "versions": versions(),
        **metric_facts(parts.evaluation),
    }


def write_result(out: Path, result: Mapping[str, Any]) -> None:
    """Write the result as JSON into the new file `out`.

    Raises:
        ConfigError: The file exists or cannot be written.
    """
    try:
        write_exclusively(out, json.dumps(result, indent=2, allow_nan=False) + "\n")
    except FileExistsError:
        raise ConfigError(f"out: expected a new file, but {out} exists already") from None
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be written: {error.strerror}") from error
