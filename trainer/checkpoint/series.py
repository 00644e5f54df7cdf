"""Snapshots of the averages over a run, from which other averages are made afterwards.

A snapshot has the format of a checkpoint and the state of the averages only; that of step 0 has the initial weights.
"""

import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from trainer.checkpoint.changes import Feedback, after_of, as_changes, chain_of
from trainer.checkpoint.places import set_aside
from trainer.checkpoint.saving import Saver, Ways, progress_of
from trainer.checkpoint.store import split
from trainer.checkpoint.writing import Prepared
from trainer.config.schema import EMAGroupConfig
from trainer.distributed.processes import on_main
from trainer.errors import ConfigError
from trainer.loop.fit import Run
from trainer.report.format import format_size
from trainer.rundir.checkpoints import committed, step_of


def snapshot_steps(steps: int, count: int, spacing: str) -> list[int]:
    """Return the steps after which a snapshot is taken, rising; the last of the run's `steps` is among them.

    Where two of the `count` snapshots fall on one step there are fewer; `spacing` is `ema.snapshot_spacing`.
    """
    if count == 0:
        return []
    if spacing == "both":
        half = count // 2
        parts = [snapshot_steps(steps, half, "geometric"), snapshot_steps(steps, count - half, "uniform")]
        return sorted({step for part in parts for step in part})
    if spacing == "geometric":
        return sorted({max(1, round(steps ** (number / count))) for number in range(1, count + 1)})
    return sorted({max(1, round(steps * number / count)) for number in range(1, count + 1)})


def snapshot_state(run: Run) -> dict[str, Any]:
    """Return what a snapshot stores: the averages or, before the first step, the weights."""
    if run.step == 0:
        return {"model": get_model_state_dict(run.network.module), "progress": progress_of(run)}
    return {"ema": _averages(run), "progress": progress_of(run)}


def set_aside_later(folder: Path, step: int) -> list[str]:
    """Rename the snapshots after the step where a session begins, and all if that is step 0; return a warning for each.

    An earlier session took them. This one makes their steps again, perhaps with other settings.
    """
    return [
        warning
        for path in committed(folder)
        if step_of(path) > step or step == 0
        for warning in set_aside(path, f"is of an earlier session, and this one begins at step {step}")
    ]


class Series(Saver):
    """Snapshots of a run, all of which are kept."""

    def __init__(
        self,
        folder: Path,
        ways: Ways,
        config: EMAGroupConfig,
        steps: int,
        session: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Prepare the context for a run of `steps` with the group `ema` of its configuration; the rest as `Saver`."""
        super().__init__(folder, ways, keep=sys.maxsize, session=session)
        self._feedback = Feedback() if config.snapshot_dtype == "bfloat16" else None
        self._encoding: Path | None = None
        self._steps = frozenset(snapshot_steps(steps, config.snapshots, config.snapshot_spacing))

    def begin(self, run: Run, note: Callable[[str], object]) -> None:
        """Check that the disk has room before the first step of a session, and keep the weights of step 0.

        If the snapshot of this step is missing, because the session before was killed while it was written, it is taken
        now.

        Raises:
            ConfigError: The disk has no room for the snapshots that are left to take; raised on every rank.

        Collectives: an object broadcast, and those of `Saver.save`.
        """
        if self._feedback is not None:
            self._continue(self._feedback, run, note)
        left = sum(step > run.step for step in self._steps)
        size = whole = _size({"ema": _averages(run)})
        if self._feedback is not None:
            size = _size({"ema": as_changes(_averages(run))})
        first = bool(left) and (self._feedback is None or self._feedback.after is None)
        needed = (left - first) * size + first * whole + (0 if run.step else _size(snapshot_state(run)))

        def prepare() -> str:
            free = shutil.disk_usage(self._folder.parent).free
            if needed > free:
                raise ConfigError(
                    f"ema.snapshots: {left} snapshots of {format_size(size)} do not fit into the"
                    f" {format_size(free)} that are free at {self._folder.parent}"
                )
            return f"snapshots: {left} of {format_size(size)}, {format_size(needed)} in all"

        note(on_main(prepare, "preparing the snapshots"))
        # An average that is new in this session has absorbed nothing yet, and absorbs the weights in the first step.
        loaded = all(average.last_iteration >= 0 for average in run.bank.values())
        if run.step == 0 or (run.step in self._steps and loaded):
            self.save(run, last=False)

    def _continue(self, feedback: Feedback, run: Run, note: Callable[[str], object]) -> None:
        """Rebuild what the stored changes lead to; without it, the next snapshot is whole.

        Collectives: an object broadcast, and those of `Feedback.load`.
        """
        try:
            chain = on_main(lambda: chain_of(self._folder, run.step), "finding the snapshots")
            feedback.load(chain, _averages(run))
        except ConfigError as error:  # the same on every rank
            note(f"warning: {error}; the next snapshot is stored whole")

    def _state_of(self, run: Run) -> dict[str, Any]:
        """Return what is stored of a run; with `ema.snapshot_dtype=bfloat16`, changes since the newest snapshot.

        Collectives: with changes, an object broadcast.
        """
        if self._feedback is None or run.step == 0:
            return snapshot_state(run)
        written = self._encoding
        self._encoding = None
        if written is not None:
            try:
                after = on_main(lambda: after_of(written)) if written == self._newest else None
                self._feedback.settle(after)
            except ConfigError as error:  # the same on every rank
                self._warn(f"warning: {error}; the next snapshot is stored whole")
                self._feedback = Feedback()
        return {**self._feedback.named(_averages(run)), "progress": progress_of(run)}

    def _encoded(self, prepared: Prepared, copies: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self._feedback is None:
            return copies
        self._encoding = prepared.path
        return self._feedback.encoded(copies)

    def after_step(self, run: Run) -> None:
        """Take a snapshot if one is due.

        Collectives: if it is due, those of `Saver.save`.
        """
        if run.step in self._steps:
            with run.clock.paused():
                self.save(run, last=False)


def _averages(run: Run) -> dict[str, Any]:
    return {name: average.state_dict() for name, average in run.bank.items()}


def _size(state: dict[str, Any]) -> int:
    """Return the bytes of all tensors, whole ones of shards."""
    tensors: dict[str, Any] = {}
    split(state, tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
