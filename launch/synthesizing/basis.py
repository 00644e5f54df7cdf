"""What a run has kept: the weights from which other averages are made, each with its weights over the steps.

These are the snapshots of its averages (`ema=posthoc`), and the live weights and averages of its checkpoints.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ema.config import EMAConfig
from ema.posthoc import (
    DECAYS,
    Snapshot,
    Synthesis,
    Weights,
    given_weights,
    rows,
    saved_snapshot,
    solve,
    window_profile,
)
from ema.state import COUNTERS, RULE, canonical, own_names
from ema.swap import published_names
from launch.merging.coefficients import weights_in
from launch.synthesizing.request import Target
from trainer.checkpoint.changes import CHANGE, After, after_of, stored_after, without
from trainer.checkpoint.continuity import check_config
from trainer.checkpoint.store import load_checkpoint, stored_progress, stored_tensors
from trainer.distributed.processes import agreeing, on_main
from trainer.errors import ConfigError, below, blamed_on, listed
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
    changes: frozenset[str] = frozenset()
    """Names of the tensors that are stored as the change from `before`."""
    before: "Kept | None" = None
    """Weights that the changes are added to."""

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
    rounding: Sequence[float] | None = None
    """Rounding error of each of `kept`, in steps (`launch.synthesizing.rounding`); None if it is unknown."""

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
            if isinstance(wanted, Weights):
                self._check_inside(wanted)
            return self.closest(wanted)

    def closest(self, wanted: Snapshot | Weights) -> Synthesis:
        """Return the coefficients that come closest to an average or to given weights of the steps."""
        return solve([one.snapshot for one in self.kept], wanted, rounding=self.rounding)

    def row(self, config: EMAConfig) -> Tensor:
        """Return the weights that the average of a rule gives to the steps, float64 `[steps]`."""
        blocks = rows([Snapshot(self.step, config, self.origin)], self.step)
        return torch.cat([block[:, 0] for _, block in blocks][::-1])

    def _check_inside(self, wanted: Weights) -> None:
        first = min(one.snapshot.start for one in self.kept)
        begin = self.step + 1 - wanted.values.numel() + int(wanted.values.nonzero()[0])
        if begin < first:
            raise ValueError(
                f"expected no weight before step {first}, the first one in the stored weights, but it begins at {begin}"
            )


def find_basis(
    run_dir: RunDir,
    step: int,
    model: nn.Module,
    patterns: Sequence[str],
    averages: Mapping[str, EMAConfig],
) -> Basis:
    """Return what a run has kept up to a step, verified.

    A folder that is damaged or of another run is left out with a note. So is an average with a user's own rule, with
    more than one rule since its start, or over other tensors than the rest.

    Args:
        run_dir: run directory.
        step: step of the averages to make; later folders are not read.
        model: model with the live weights of this step.
        patterns: names and patterns of the weights to combine. All others are only compared, at this step.
        averages: settings of the run's averages by name.

    Raises:
        ConfigError: Fewer than two weights are left, a pattern matches none, or the newest are older than the step;
            raised on every rank.

    Collectives: for each folder an object all-gather and those of `load_checkpoint`.
    """
    read, notes = _Reading(run_dir, model, averages), list[str]()
    found: dict[tuple[int, str], Kept] = {}
    for path in on_main(lambda: _folders(run_dir, step), "finding the snapshots"):
        try:
            weights, left_out = read(path)
        except ConfigError as error:  # the same on every rank
            notes.append(f"left out: {error}")
            continue
        notes += left_out
        for one in weights:
            place = one.snapshot.step, one.name
            if place not in found or found[place].changes:  # a checkpoint has the average itself
                found[place] = one
    every = _over_the_same_tensors(list(found.values()), notes)
    kept = [one for one in every if any(fnmatchcase(one.name, pattern) for pattern in patterns)]
    try:
        _check_span(run_dir, step, patterns, every, kept)
    except ConfigError as error:
        raise ConfigError("; ".join([str(error), *([listed(notes, most=2)] if notes else [])])) from error
    notes += _rounded(kept)
    starts = [one.snapshot.start for one in kept if one.snapshot.config is not None]
    compared = [one for one in every if one.snapshot.step == step]
    origin = min(starts, default=0)
    if origin > 0:
        notes.append(f"the averages begin with the weights of step {origin}, as the stored ones do")
    return Basis(step, kept, compared, origin, notes)


def _rounded(kept: Sequence[Kept]) -> list[str]:
    """Return a note for each dtype in which rounding can change averages by more than the predicted errors say."""
    found: dict[torch.dtype, set[str]] = {}
    for one in kept:
        for name, tensor in one.tensors.items() if one.name != LIVE else ():
            if name not in one.changes and tensor.dtype in (torch.bfloat16, torch.float16):
                found.setdefault(tensor.dtype, set()).add(one.name)
    return [
        f"{listed(sorted(names))} in {str(dtype).removeprefix('torch.')}: the rounding of each update adds up, and"
        " the errors can be larger than predicted"
        for dtype, names in found.items()
    ]


def _check_span(
    run_dir: RunDir, step: int, patterns: Sequence[str], every: Sequence[Kept], kept: Sequence[Kept]
) -> None:
    """Check that there are weights to combine, by each pattern, up to the step."""
    names = list(dict.fromkeys(one.name for one in every))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"basis: expected names or patterns of {listed(names)}, got {pattern[:300]}")
    if len(kept) < 2:
        raise ConfigError(
            f"RUN_DIR: {run_dir.path} has fewer than two weights to combine up to step {step}, found"
            f" {listed([one.text for one in kept])}; train with ema=posthoc, or keep checkpoints"
        )
    newest = max(one.snapshot.step for one in kept)
    if newest < step:
        raise ConfigError(
            f"basis: expected weights of step {step}, but the newest of {','.join(patterns)[:300]} are of step {newest}"
        )


def _folders(run_dir: RunDir, step: int) -> list[Path]:
    """Return the folders of snapshots, then of checkpoints, which a run that goes on may delete, up to a step."""
    return [
        path
        for folder in (run_dir.snapshots, run_dir.checkpoints)
        for path in committed(folder)
        if step_of(path) <= step
    ]


class _Reading:
    """The reading of the folders of a run."""

    def __init__(self, run_dir: RunDir, model: nn.Module, averages: Mapping[str, EMAConfig]) -> None:
        self._run_dir, self._averages = run_dir, averages
        self._names = published_names(model)
        self._buffers = {canonical(name) for name, _ in model.named_buffers(remove_duplicate=False)}
        self._series: dict[tuple[After, str], Kept] = {}

    def __call__(self, path: Path) -> tuple[list[Kept], list[str]]:
        """Return the weights in a folder, whose files are verified, and notes on those that are left out.

        Raises:
            ConfigError: The folder is damaged, cannot be read, or is of another run; the same on every rank.

        Collectives: an object all-gather, and those of `load_checkpoint`.
        """
        # An error that only one rank has must not change which folders it combines: it is raised on all.
        with agreeing("reading a snapshot", Exception):
            stored, progress = stored_tensors(path), stored_progress(path)
            after, own = stored_after(path), after_of(path)
            with below(str(path)):
                check_config(self._run_dir, path)
        averages = [name for name in progress.averages if f"{AVERAGE}{name}/{COUNTERS}" in stored]
        heads: dict[str, Any] = {
            name: {
                key: torch.empty_like(stored[f"{AVERAGE}{name}/{key}"], device="cpu")
                for key in (COUNTERS, RULE)
            }
            for name in averages
        }
        loaded = load_checkpoint(path, {"ema": heads})
        found, notes = [], []
        if any(key.startswith(MODEL) for key in stored):
            keys = {key.removeprefix(MODEL): key for key in stored if key.startswith(MODEL)}
            found.append(self._kept(path, LIVE, keys, stored, Snapshot(progress.step)))
        for name in averages:
            one, fault = self._average(path, name, stored, after, loaded["ema"][name])
            if one.before is not None or not one.changes:
                self._series[own, name] = one
            if fault is None and one.snapshot.step != progress.step:
                fault = f"is of step {one.snapshot.step}"
            if fault is not None:
                notes.append(f"left out: {path}: {AVERAGE}{name} {fault}")
            elif one.snapshot.config is not None:  # else the average had not started
                found.append(one)
        return found, notes

    def _average(
        self,
        path: Path,
        name: str,
        stored: Mapping[str, Tensor],
        after: After | None,
        head: Mapping[str, Any],
    ) -> tuple[Kept, str | None]:
        """Return an average in a folder, and why its weights cannot be used, or None."""
        fault = None
        prefixes = f"{AVERAGE}{name}/", f"{CHANGE}{name}/"
        places = {
            key.removeprefix(prefix): key for prefix in prefixes for key in stored if key.startswith(prefix)
        }
        keys = {model_name: places[key] for key, model_name in own_names(list(places), self._names).items()}
        try:
            snapshot = saved_snapshot(head)
        except ValueError as error:
            snapshot, fault = Snapshot(step_of(path)), f"has no usable rule: {error}"
        one = self._kept(path, f"{AVERAGE}{name}", keys, stored, snapshot)
        changes = frozenset(key for key, place in one.keys.items() if place.startswith(CHANGE))
        if not changes:
            return one, fault
        before = None if after is None else self._series.get((after, name))
        if before is None or not changes <= before.keys.keys():
            fault = "has changes of an unknown snapshot" if after is None else without(after)
        return replace(one, changes=changes, before=before), fault

    def _kept(
        self, path: Path, name: str, keys: Mapping[str, str], stored: Mapping[str, Tensor], snapshot: Snapshot
    ) -> Kept:
        """Return the weights with the tensors that have a mean; all others are those of the newest live weights."""
        averages = (
            self._averages.values() if name == LIVE else [self._averages.get(name.removeprefix(AVERAGE))]
        )
        patterns = [pattern for one in averages if one is not None for pattern in one.average_buffers]
        chosen = {
            key: place
            for key, place in keys.items()
            if key not in {COUNTERS, RULE}
            and (stored[place].is_floating_point() or stored[place].is_complex())
            and (key not in self._buffers or any(fnmatchcase(key, pattern) for pattern in patterns))
        }
        return Kept(path, name, chosen, {key: stored[place] for key, place in chosen.items()}, snapshot)


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
        keys = {name: key for name, key in one.keys.items() if name in common}
        found.append(replace(one, keys=keys, tensors={name: one.tensors[name] for name in keys}))
    return found
