"""What a run has kept: the weights from which other averages are made, each with its weights over the steps.

These are the snapshots of its averages (`ema=posthoc`), and the live weights and averages of its checkpoints.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ema.posthoc import (
    DECAYS,
    Snapshot,
    Synthesis,
    Weights,
    given_weights,
    saved_snapshot,
    solve,
    window_profile,
)
from ema.state import COUNTERS, RULE, canonical, own_names
from ema.swap import published_names
from launch.merging.coefficients import weights_in
from launch.synthesizing.request import Target
from trainer.checkpoint.format import CheckpointError
from trainer.checkpoint.store import load_checkpoint, stored_progress, stored_tensors
from trainer.distributed.processes import agreeing, on_main
from trainer.errors import ConfigError, blamed_on, listed
from trainer.rundir.checkpoints import committed, step_of
from trainer.rundir.directory import RunDir
from trainer.rundir.keys import AVERAGE, LIVE
from trainer.weights.run_directory import MODEL


@dataclass(frozen=True)
class Kept:
    """Stored weights and their place."""

    path: Path
    """Folder in the format of a checkpoint."""
    name: str
    """`live` or `ema/NAME`."""
    keys: Mapping[str, str]
    """Key in the folder by the model's name of each tensor."""
    tensors: Mapping[str, Tensor]
    """Meta tensor of its shape and dtype, by the same names."""
    snapshot: Snapshot
    """Step and rule."""

    @property
    def text(self) -> str:
        """The place for messages."""
        return f"{self.path.parent.name}/{self.path.name}:{self.name}"


@dataclass(frozen=True)
class Basis:
    """Stored weights up to a step, all over the same tensors."""

    step: int
    """Step of the averages to make."""
    kept: Sequence[Kept]
    """Weights to combine."""
    compared: Sequence[Kept]
    """Weights of this step, to compare with."""
    origin: int
    """Iteration whose weights the averages absorb first."""
    notes: Sequence[str] = field(default_factory=list)
    """Remarks for the user on what was left out."""

    def solve(self, target: Target) -> Synthesis:
        """Return the coefficients that come closest to a target.

        Raises:
            ConfigError: The target does not fit into the steps.
        """
        wanted: Snapshot | Weights
        with blamed_on(target.name):
            if target.config is not None:
                wanted = Snapshot(self.step, target.config, self.origin)
            elif target.profile in DECAYS:
                wanted = window_profile(DECAYS[target.profile], self.step, target.window)
            else:
                wanted = given_weights(weights_in(Path(target.profile)), self.step)
            return solve([one.snapshot for one in self.kept], wanted)


def find_basis(run_dir: RunDir, step: int, model: nn.Module, patterns: Sequence[str]) -> Basis:
    """Return what a run has kept up to a step, verified.

    A folder that is damaged, and an average with a user's own rule or over other tensors than the rest, is left out
    with a note.

    Args:
        run_dir: run directory.
        step: step of the averages to make; later folders are not read.
        model: model with the live weights of this step.
        patterns: names and patterns of the weights to combine. All others are only compared, at this step.

    Raises:
        ConfigError: Nothing but the live weights of this step is left; raised on every rank.

    Collectives: for each folder those of `load_checkpoint`.
    """
    # A buffer that an average copies is that of the newest live weights, not a combination.
    buffers = {canonical(name) for name, _ in model.named_buffers(remove_duplicate=False)}
    names, notes = published_names(model), list[str]()
    found: dict[tuple[int, str], Kept] = {}
    for path in on_main(lambda: _folders(run_dir, step), "finding the snapshots"):
        try:
            with agreeing("reading a snapshot", Exception, collectives=True):
                read = _read(path, names, buffers, notes)
        except CheckpointError as error:
            notes.append(f"left out: {error}")
            continue
        for one in read:
            found.setdefault((one.snapshot.step, one.name), one)
    every = _over_the_same_tensors(list(found.values()), notes)
    kept = [one for one in every if any(fnmatchcase(one.name, pattern) for pattern in patterns)]
    averages = [one.snapshot.start for one in kept if one.snapshot.config is not None]
    if len(kept) < 2:
        raise ConfigError(
            f"RUN_DIR: {run_dir.path} has fewer than two weights to combine up to step {step}, found"
            f" {listed([one.text for one in every])}; train with ema=posthoc, or keep checkpoints"
        )
    compared = [one for one in every if one.snapshot.step == step]
    return Basis(step, kept, compared, min(averages, default=0), notes)


def _folders(run_dir: RunDir, step: int) -> list[Path]:
    """Return the folders of checkpoints, then of snapshots, up to a step."""
    return [
        path
        for folder in (run_dir.checkpoints, run_dir.snapshots)
        for path in committed(folder)
        if step_of(path) <= step
    ]


def _read(path: Path, names: set[str], buffers: set[str], notes: list[str]) -> list[Kept]:
    """Return the weights in a folder, whose files are verified, without buffers.

    Raises:
        CheckpointError: A file is damaged or cannot be read.
    """
    stored, progress = stored_tensors(path), stored_progress(path)
    averages = [name for name in progress.averages if f"{AVERAGE}{name}/{COUNTERS}" in stored]
    heads: dict[str, Any] = {
        name: {
            key: torch.empty_like(stored[f"{AVERAGE}{name}/{key}"], device="cpu") for key in (COUNTERS, RULE)
        }
        for name in averages
    }
    loaded = load_checkpoint(path, {"ema": heads})
    found = []
    if any(key.startswith(MODEL) for key in stored):
        keys = {key.removeprefix(MODEL): key for key in stored if key.startswith(MODEL)}
        keys = {key: place for key, place in keys.items() if key not in buffers}
        found.append(_kept(path, LIVE, keys, stored, Snapshot(progress.step)))
    for name in averages:
        try:
            snapshot = saved_snapshot(loaded["ema"][name])
        except ValueError as error:
            notes.append(f"left out: {path}: {AVERAGE}{name}: {error}")
            continue
        if snapshot.config is None:  # the average had not started
            continue
        prefix = f"{AVERAGE}{name}/"
        own = [key.removeprefix(prefix) for key in stored if key.startswith(prefix)]
        keys = {model_name: f"{prefix}{key}" for key, model_name in own_names(own, names).items()}
        keys = {key: place for key, place in keys.items() if key not in {COUNTERS, RULE, *buffers}}
        found.append(_kept(path, f"{AVERAGE}{name}", keys, stored, snapshot))
    return found


def _kept(
    path: Path, name: str, keys: Mapping[str, str], stored: Mapping[str, Tensor], snapshot: Snapshot
) -> Kept:
    floating = {key: place for key, place in keys.items() if stored[place].is_floating_point()}
    return Kept(path, name, floating, {key: stored[place] for key, place in floating.items()}, snapshot)


def _over_the_same_tensors(kept: list[Kept], notes: list[str]) -> list[Kept]:
    """Leave out averages over other tensors than the most; restrict live weights to the tensors of the averages."""
    sets = [frozenset(one.keys) for one in kept if one.name != LIVE]
    if not sets:
        return kept
    common = max(dict.fromkeys(sets), key=sets.count)
    found = []
    for one in kept:
        if not common <= one.keys.keys() or (one.name != LIVE and common != one.keys.keys()):
            notes.append(f"left out: {one.text} has other tensors than the averages")
            continue
        found.append(_kept_only(one, common))
    return found


def _kept_only(one: Kept, names: frozenset[str]) -> Kept:
    keys = {name: key for name, key in one.keys.items() if name in names}
    tensors = {name: one.tensors[name] for name in keys}
    return Kept(one.path, one.name, keys, tensors, one.snapshot)
