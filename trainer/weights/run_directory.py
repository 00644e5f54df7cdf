"""Weights in a checkpoint of a run directory: the live weights, or an average with the live values of the rest."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ema.state import COUNTERS, RULE, Counters, own_names, read_rule
from trainer.checkpoint.store import load_checkpoint, stored_tensors
from trainer.checkpoint.training_state import BATCHNORM
from trainer.distributed.processes import agreeing, on_main
from trainer.errors import ConfigError
from trainer.rundir.checkpoints import MARKER
from trainer.rundir.directory import RunDir
from trainer.rundir.keys import AVERAGE, LIVE
from trainer.weights.selection import Chosen, choose_checkpoint, choose_one
from trainer.weights.source import KEY, Source, copy_values, own_part

MODEL = "model/"
"""Beginning of the keys of live tensors in a checkpoint."""


class RunWeights(Source):
    """The live weights or one average of a checkpoint; DCP reads each rank's own part.

    Args:
        path: run directory.
        weights: `live`, `ema/NAME`, or `ema` if the run has one average.
        step: `last`, `best` or a number of steps.

    Raises:
        ConfigError: There is no such checkpoint or average, the average had not started, or a file is damaged.
    """

    kind = "run"

    def __init__(self, path: Path, weights: str, step: str | int) -> None:
        self.path = path
        # Rank 0 chooses: another run may be writing checkpoints in this directory.
        chosen, name = on_main(lambda: _choose(path, weights, step), "choosing the checkpoint to start from")
        self._checkpoint = chosen.path
        self.files = [chosen.path / MARKER]
        self.facts = {"step": chosen.step, "weights": name}
        self.notes = [chosen.note] if chosen.note else []
        self.aliases = {}
        with agreeing("reading the checkpoint's index"):
            stored = stored_tensors(chosen.path)
        average = None if name == LIVE else name.removeprefix(AVERAGE)
        keys = [] if average is None else [f"{AVERAGE}{average}/{key}" for key in (COUNTERS, RULE)]
        with agreeing("reading the counters of the average", Exception):
            state = {key: torch.empty_like(stored[key], device="cpu") for key in keys}
        loaded = load_checkpoint(chosen.path, state)  # verifies the files
        if average is not None:
            with agreeing("checking the average"):
                started_counters(loaded.__getitem__, chosen.step, average)
        names = [key.removeprefix(MODEL) for key in stored if key.startswith(MODEL)]
        self._keys = {name: keys[0] for name, keys in keys_by_name(names, average, stored).items()}
        self.tensors = {name: stored[key] for name, key in self._keys.items()}

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        into: dict[str, Tensor] = {}
        for name, target in targets.items():
            # DCP reads into a tensor of the stored dtype.
            dtype = self.tensors[name].dtype
            same = target.dtype == dtype
            into[self._keys[name]] = target if same else torch.empty_like(target, dtype=dtype)
        load_checkpoint(self._checkpoint, into, verified=True)
        for name, target in targets.items():
            read = into[self._keys[name]]
            if read is not target:
                copy_values(name, own_part(read)[0], own_part(target)[0])


def _choose(path: Path, weights: str, step: str | int) -> tuple[Chosen, str]:
    chosen = choose_checkpoint(RunDir.open(path, key=KEY), step, [weights])
    return chosen, choose_one(weights, chosen.averages)


def started_counters(
    read: Callable[[str], Tensor], step: int, average: str
) -> tuple[Counters, dict[str, Any]]:
    """Return the counters of an average and the fields of its rule; `read` returns a tensor by its key.

    Raises:
        ConfigError: The average had not started, or its entries in the checkpoint are damaged.
    """
    try:
        counters = Counters.from_tensor(read(f"{AVERAGE}{average}/{COUNTERS}"))
        fields = read_rule(read(f"{AVERAGE}{average}/{RULE}"))
    except ValueError as error:
        raise ConfigError(f"the checkpoint of step {step} is damaged: ema/{average}/{error}") from error
    if not counters.started:
        raise ConfigError(
            f"weights: ema/{average} had not started at step {step}"
            f" (ema.start_iter={fields.get('start_iter')}); choose the live weights or a later step"
        )
    return counters, fields


def keys_by_name(
    names: Collection[str], average: str | None, stored: Collection[str]
) -> dict[str, list[str]]:
    """Return the keys of each tensor of the model in a checkpoint; the first one has the wanted values.

    The average None means the live weights. Tensors that an average does not track have live values. The statistics
    with which it was evaluated come before those that it copied.
    """
    parts: list[Mapping[str, str]] = [{name: f"{MODEL}{name}" for name in names}]
    if average is not None:
        prefix = f"{AVERAGE}{average}/"
        own = [key.removeprefix(prefix) for key in stored if key.startswith(prefix)]
        parts.insert(0, {name: f"{prefix}{key}" for key, name in own_names(own, names).items()})
        parts.insert(0, {name: f"{BATCHNORM}/{average}/{name}" for name in names})
    keys: dict[str, list[str]] = {
        name: [part[name] for part in parts if part.get(name) in stored] for name in names
    }
    return {name: found for name, found in keys.items() if found}
