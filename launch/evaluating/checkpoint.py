"""What `launch.evaluate` does once its command line is settled: in every process, with trainer's own evaluation.

Neither an optimizer nor the run's averages are built. An average is read from the checkpoint when its turn comes, by
the names of its tensors alone, so neither its rule nor its settings are needed, and one is in memory at a time.
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

from ema.state import COUNTERS, RULE, Counters
from ema.swap import empty_weights, published_names, weights_swapped_into
from launch.evaluating.request import Request, Setting
from launch.selection import choose_checkpoint, choose_weights
from trainer.build import Evaluated, build_evaluated
from trainer.checkpoint.store import load_checkpoint, stored_tensors
from trainer.checkpoint.training_state import load_weights
from trainer.config.compose import freeze_config
from trainer.config.schema import Config
from trainer.distributed.failures import in_all_processes
from trainer.distributed.processes import Processes, agreeing, meeting, on_main
from trainer.errors import EXIT_DONE, ConfigError
from trainer.evaluation.evaluation import metric_facts
from trainer.report.comparison import combine
from trainer.report.format import display_name
from trainer.report.headline import headline
from trainer.report.runs import Run
from trainer.report.text.brief import other_metrics
from trainer.report.text.table import Line, Table, row_cells, row_headers, row_notes
from trainer.report.text.terminal import print_tables
from trainer.report.verdicts import rows_of
from trainer.rundir.columns import Series
from trainer.rundir.directory import RunDir, versions
from trainer.rundir.files import write_exclusively
from trainer.rundir.keys import AVERAGE, LIVE


@dataclass(frozen=True)
class Choice:
    """What is evaluated, and where the result goes; settled by rank 0 before anything is built."""

    checkpoint: Path
    step: int
    live: bool
    averages: list[str]
    out: Path
    note: str | None


class StoredAverage:
    """An average in a checkpoint; its tensors are read when it is swapped in.

    Args:
        checkpoint: committed, and loaded from by these ranks before.
        name: of the average.
        stored: its tensors by the model's names, each as a meta tensor of shape and dtype.
        counters: its own, loaded.
    """

    def __init__(
        self, checkpoint: Path, name: str, stored: Mapping[str, torch.Tensor], counters: Counters
    ) -> None:
        self._checkpoint, self._name = checkpoint, name
        self._stored, self._counters = stored, counters

    @property
    def started(self) -> bool:
        """Whether it holds weights of its own."""
        return self._counters.started

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """Put it in the place of the live weights; what it does not track keeps them.

        Collectives: those of `load_checkpoint`. Memory: the average and a copy of the live weights, by shard.

        Raises:
            ConfigError: the checkpoint cannot be read.
        """
        state = empty_weights(model, {name: stored.dtype for name, stored in self._stored.items()})
        load_checkpoint(self._checkpoint, {"ema": {self._name: state}}, verified=True)
        with weights_swapped_into(model, state):
            yield


def evaluate(request: Request, setting: Setting) -> int:
    """Evaluate in every process, print and write on rank 0; returns the exit code.

    Raises:
        ConfigError: bad input that every rank sees before it joins the others; later ones are printed here.
    """
    frozen = freeze_config(setting.config)
    return in_all_processes(
        setting.config.trainer, frozen, lambda processes: _evaluate(request, setting, processes)
    )


def _evaluate(request: Request, setting: Setting, processes: Processes) -> int:
    choice = on_main(lambda: choose(request, setting.run_dir), "choosing the checkpoint")
    parts = build_evaluated(without_gradients(setting.config), processes, setting.allowed)
    with agreeing("loading the checkpoint"):
        averages = load(choice, parts.network.module)
    late = [name for name, average in averages.items() if not average.started]
    judged = [LIVE] * choice.live + [f"ema/{name}" for name in averages if name not in late]
    if processes.is_main:
        if choice.note:
            print(f"note: {choice.note}")
        for name in late:
            print(f"ema/{name} had not started at step {choice.step}: left out")
        if judged:
            count = parts.evaluation.num_samples
            print(f"step {choice.step}: evaluating {', '.join(judged)} on {count} samples", flush=True)
        if (changed := data_note(setting.overrides)) is not None:
            print(f"note: {changed}", flush=True)
    with agreeing("choosing the weights"):
        if not judged:
            names = ", ".join(request.weights)
            raise ConfigError(f"weights: none of {names} had started at step {choice.step}")
    with meeting("evaluating"):
        record = parts.evaluation(parts.network, averages, live=choice.live)
    with agreeing("writing the result"):
        if processes.is_main:
            facts = metric_facts(parts.evaluation)
            print_tables(tables_of(setting.run_dir, choice.step, record, facts, setting.overrides))
            write_result(choice.out, result_of(setting, choice, parts, processes, judged, late, record))
            print(f"written: {os.path.relpath(choice.out)}")
    return EXIT_DONE


def choose(request: Request, run_dir: RunDir) -> Choice:
    """Find the checkpoint, the weights in it and a place for the result; reads no tensor.

    Raises:
        ConfigError: there is no such checkpoint, no such weights, or the result cannot be written.
    """
    chosen = choose_checkpoint(run_dir, request.step, request.weights)
    checkpoint, step = chosen.path, chosen.step
    names = choose_weights(request.weights, chosen.averages)
    out = request.out or run_dir.evaluations / (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d_%H-%M-%S}_step-{step}_{secrets.token_hex(3)}.json"
    )
    _check_writable(out)
    averages = [name.removeprefix(AVERAGE) for name in names if name != LIVE]
    return Choice(checkpoint, step, LIVE in names, averages, out, chosen.note)


def _check_writable(out: Path) -> None:
    if out.exists():
        raise ConfigError(f"out: {out} exists already; expected a file to make")
    folder = next(folder for folder in out.parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"out: {folder} cannot be written; give another place: out=FILE")


def without_gradients(config: Config) -> Config:
    """The same model with no provision for a backward: DDP's buckets are as large as the model."""
    if config.sharding.strategy != "ddp":
        return config
    return dataclasses.replace(config, sharding=dataclasses.replace(config.sharding, strategy="none"))


def load(choice: Choice, model: nn.Module) -> dict[str, StoredAverage]:
    """Load the live weights into the model, and of each average whether it had started.

    Collectives: those of `load_weights`.

    Raises:
        ConfigError: the checkpoint does not fit the model or is damaged.
    """
    counters = {name: {COUNTERS: Counters().to_tensor()} for name in choice.averages}
    loaded = load_weights(choice.checkpoint, model, {"ema": counters})
    stored, known = stored_tensors(choice.checkpoint), published_names(model)
    averages = {}
    for name in choice.averages:
        prefix = f"ema/{name}/"
        own = {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}
        tensors = {key: tensor for key, tensor in own.items() if key not in (COUNTERS, RULE)}
        foreign = [key for key in tensors if key not in known]
        if foreign:
            raise ConfigError(
                f"{choice.checkpoint} has {prefix}{foreign[0]}, and the model has no such tensor"
            )
        try:
            count = Counters.from_tensor(loaded["ema"][name][COUNTERS])
        except ValueError as error:
            raise ConfigError(f"{choice.checkpoint} is damaged: {error}") from error
        averages[name] = StoredAverage(choice.checkpoint, name, tensors, count)
    return averages


def data_note(overrides: Sequence[str]) -> str | None:
    """What to tell of an evaluation on the run's data cut in another way; None if it was left alone or replaced."""
    keys = [override.partition("=")[0].lstrip("+~") for override in overrides]
    changed = [key for key in keys if key.startswith("data.")]
    if not changed or "data" in keys:
        return None
    return f"{', '.join(changed)}: nothing keeps what the run was trained on out of these samples"


def tables_of(
    run_dir: RunDir,
    step: int,
    record: Mapping[str, float],
    facts: Mapping[str, Any],
    overrides: Sequence[str],
) -> list[Table]:
    """Live weights against every average by the primary metric, and a line for each other; else a table each.

    Args:
        run_dir: what was evaluated.
        step: of the checkpoint.
        record: as `trainer.evaluation.evaluation.Evaluation` returns it.
        facts: of the task that judged, which need not be the run's own.
        overrides: what was evaluated differently, for the title.
    """
    columns = {key: Series(np.array([step]), np.array([number])) for key, number in record.items()}
    run = Run(run_dir.path, run_dir.path.name, columns, dict(facts))
    names = dict.fromkeys(key.rpartition("/")[2] for key in record if not key.startswith("eval/gap/"))
    metrics = sorted(names, key=lambda name: name != run.primary_metric)
    if not any(key.startswith("eval/gap/") for key in record):
        return [_table(run, metric, step, overrides) for metric in metrics]
    others = other_metrics([found for metric in metrics if (found := combine([run], metric)) is not None])
    return [_table(run, metrics[0], step, overrides), *([others] if others else [])]


def _table(run: Run, metric: str, step: int, overrides: Sequence[str]) -> Table:
    rows, higher = rows_of(run, metric), run.higher_is_better(metric)
    lines = []
    for row in rows:
        cells, keys = row_cells(row, step)
        # One evaluation has no other step that could be its best.
        lines.append(Line([display_name(row.weights), *cells[:4]], [row.weights, *keys[:4]], row.last.winner))
    headers = ["weights", *row_headers(f"{run.with_unit(metric)} at step {step}", rows)[:4]]
    compared = any(row.last.gap is not None for row in rows)
    told = headline(rows, higher) if compared else ""
    notes = row_notes(rows, higher)[:2] if compared else []
    return Table(" ".join([f"{run.name}: {metric}", *overrides]), headers, lines, told, notes)


def result_of(
    setting: Setting,
    choice: Choice,
    parts: Evaluated,
    processes: Processes,
    judged: list[str],
    late: list[str],
    record: Mapping[str, float],
) -> dict[str, Any]:
    """What the file says: the metrics under the names of `metrics.jsonl`, and how they came about."""
    return {
        "run": setting.run_dir.path.name,
        "config_sha256": setting.run_dir.meta["config_sha256"],
        "step": choice.step,
        "weights": judged,
        "not_started": [f"ema/{name}" for name in late],
        "metrics": {key: number if math.isfinite(number) else None for key, number in record.items()},
        "num_samples": parts.evaluation.num_samples,
        "overrides": setting.overrides,
        "world_size": processes.world_size,
        "sharding": setting.config.sharding._target_ or setting.config.sharding.strategy,
        "versions": versions(),
        **metric_facts(parts.evaluation),
    }


def write_result(out: Path, result: Mapping[str, Any]) -> None:
    """Write it as JSON into a file that must not exist.

    Raises:
        ConfigError: it exists by now, or cannot be written.
    """
    try:
        write_exclusively(out, json.dumps(result, indent=2, allow_nan=False) + "\n")
    except FileExistsError:
        raise ConfigError(f"out: {out} exists already; expected a file to make") from None
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be written: {error.strerror}") from error
