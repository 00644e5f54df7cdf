"""Evaluation of merged weights beside the newest checkpoint, on the evaluation data of a run."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ema.swap import empty_weights, weights_swapped_into
from launch.evaluating.checkpoint import tables_of, without_gradients
from launch.evaluating.request import Setting
from launch.exporting.weights import build_plain
from launch.merging.sources import Reader
from trainer.build import build_evaluated
from trainer.distributed.failures import in_all_processes
from trainer.distributed.processes import Processes
from trainer.errors import EXIT_DONE, ConfigError
from trainer.evaluation.facts import metric_facts
from trainer.evaluation.first_forward import refuse_typed
from trainer.report.text.terminal import print_tables
from trainer.rundir.pairs import Pairs
from trainer.shell.printable import print_text
from trainer.weights.source import copy_part

NAME = "merged"
"""Name of the merged weights in the table."""


class Stored:
    """Weights in files, with the names and shapes of the model, which are read each time they are swapped in."""

    started = True

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """Replace the live weights within the context; memory: these weights and a copy of the live ones."""
        names = model.state_dict().keys()
        stored = {name: tensor for name, tensor in self._reader.tensors.items() if name in names}
        weights = empty_weights(model, stored)
        _read_into(weights, self._reader)
        with weights_swapped_into(model, weights):
            yield


def check_fits(setting: Setting, newest: Reader) -> None:
    """Check that the weights have the names and shapes of the run's model, which is built on the meta device.

    Raises:
        ConfigError: A name or a shape differs; the message begins with `evaluate`.
    """
    state = build_plain(setting.config.model, setting.allowed).state_dict(keep_vars=True)
    wanted = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    groups: dict[int, list[str]] = {}
    for name, tensor in wanted.items():
        groups.setdefault(id(tensor), []).append(name)
    for names in groups.values():
        found = [name for name in names if name in newest.tensors]
        if not found:
            raise ConfigError(
                f"evaluate: the model of {setting.run_dir.path} has {names[0]}, the checkpoints do not"
            )
        for name in found:
            here, there = tuple(newest.tensors[name].shape), tuple(wanted[name].shape)
            if here != there:
                raise ConfigError(
                    f"evaluate: {name} has shape {here}, and {there} in the model of {setting.run_dir.path}"
                )
    if unknown := [name for name in newest.tensors if name not in wanted]:
        raise ConfigError(
            f"evaluate: the checkpoints have {unknown[0]}, the model of {setting.run_dir.path} does not"
        )


def evaluate_beside(setting: Setting, newest: Reader, write: Callable[[], Reader]) -> int:
    """Evaluate the newest checkpoint and the merged weights on the same samples, print the table, return the exit code.

    `write`, which writes the merged weights, is called when data, task and model are built.

    Raises:
        ConfigError: Bad input found before the process group is made. Later errors are printed here.
    """
    return in_all_processes(setting.config, lambda processes: _evaluate(setting, newest, write, processes))


def _evaluate(setting: Setting, newest: Reader, write: Callable[[], Reader], processes: Processes) -> int:
    config = without_gradients(setting.config)
    # BatchNorm statistics as the file has them: nothing is estimated again that the file would lack.
    config = dataclasses.replace(config, ema=dataclasses.replace(config.ema, batchnorm_batches=0))
    parts = build_evaluated(config, setting.averages, processes, setting.allowed)
    refuse_typed(parts.primary_faults, setting.overrides)
    for warning in parts.splits.warnings:
        print_text(f"warning: {warning}")
    merged = write()
    state = parts.network.module.state_dict()
    _read_into({name: state[name] for name in newest.tensors if name in state}, newest)
    parts.network.module.load_state_dict(state)
    kept: list[Pairs] = []
    record = parts.evaluation(
        parts.network, {NAME: Stored(merged)}, step=newest.snapshot.step or 0, keep=kept.append
    )
    print_text(
        f"evaluated on {parts.evaluation.num_samples} samples: live is {newest.snapshot.text}, EMA {NAME} is"
        f" {merged.snapshot.text}"
    )
    facts = metric_facts(parts.evaluation)
    print_tables(tables_of(setting.run_dir, kept[0], record, facts, setting.overrides))
    return EXIT_DONE


@torch.no_grad()
def _read_into(targets: Mapping[str, Tensor], reader: Reader) -> None:
    for name, target in targets.items():
        copy_part(name, target, partial(reader.read, name))
