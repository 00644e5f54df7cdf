"""Save the checkpoints of a run: between two steps, or by a thread while the training goes on."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist
from torch import Tensor

from trainer.checkpoint.on_checkpoint import OnCheckpoint
from trainer.checkpoint.places import prune
from trainer.checkpoint.staging import Staging
from trainer.checkpoint.training_state import BATCHNORM, LOSS_SCALE, training_state
from trainer.checkpoint.writing import Prepared, prepare, write
from trainer.distributed.processes import (
    agreeing,
    gather,
    group_apart,
    meeting,
    own_rank,
    raised_together,
    world_size,
)
from trainer.errors import NotSaved
from trainer.evaluation.evaluation import Evaluation
from trainer.loop.fit import Run
from trainer.loop.misfits import PARTS, fitting
from trainer.rundir.same_place import SamePlace

ENDING_PATIENCE_S = 10.0
"""Seconds that a rank with an error waits for the checkpoint that its thread is writing with the other ranks."""


@dataclass(frozen=True)
class Ways:
    """How checkpoints are written."""

    warn: Callable[[str], object]
    """Function that shows a message to the user."""
    background: bool = False
    """Whether a thread writes them."""
    timeout: timedelta | None = None
    """Time that the ranks' threads wait for each other; None is torch's default."""
    place: SamePlace | None = None
    """The run directory as it was at the start, on rank 0; None elsewhere."""


class Saver:
    """The checkpoints of a run, written one at a time.

    In the background a save copies the state and returns; a thread writes and commits the copy and deletes old
    checkpoints. So a save costs the training little time, and the host one more copy of the state. Without it a save
    returns after the commit; only the deletion of old checkpoints is left to a thread.

    Leaving the context waits for the thread. Collectives: entering makes a gloo group of all ranks for the
    background; the threads use no other group.
    """

    def __init__(
        self,
        folder: Path,
        ways: Ways,
        *,
        keep: int,
        session: Callable[[], Mapping[str, Any]] = dict,
        evaluation: Evaluation | None = None,
        command: OnCheckpoint | None = None,
    ) -> None:
        """Prepare the context.

        Args:
            folder: folder of all checkpoints of the run.
            ways: how they are written.
            keep: number of newest checkpoints to keep, at least 1.
            session: function that waits until the records are on disk and returns `session_facts`.
            evaluation: evaluation of the run; the BatchNorm statistics with which it evaluates each average are stored
                too. None stores none.
            command: command that is started after each commit, on rank 0; None elsewhere, or if there is none.
        """
        self._folder, self._keep = folder, keep
        self._background, self._timeout = ways.background, ways.timeout
        self._session, self._evaluation = session, evaluation
        self._place, self._command, self._warn = ways.place, command, ways.warn
        self._staging = Staging()
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[int, Path, Future[list[str]]] | None = None
        self._expected = 0
        self._ended: list[tuple[int, Path] | None] = []
        self._newest: Path | None = None

    def __enter__(self) -> Self:
        if self._background:
            self._group = group_apart(self._timeout)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.settle()
            if self._group is not None:
                dist.destroy_process_group(self._group)
        elif self._pending is not None:
            # A checkpoint that is almost written is worth a wait; ranks that have failed cannot finish theirs.
            # Its own error stays unreported: another one ends the run.
            with suppress(TimeoutError):
                self._pending[-1].exception(None if world_size() == 1 else ENDING_PATIENCE_S)
        self._pending = self._group = None

    def save(self, run: Run, *, last: bool = True) -> None:
        """Save the current state; wait for the previous save first.

        With `last`, the run ends now, and this returns after the commit; another save only warns if it fails.

        Raises:
            NotSaved: The records before any checkpoint, or the last checkpoint, could not be written; raised on every
                rank.
            ConfigError: The parts of the run do not fit together in the forwards of the evaluation.

        Collectives: an object all-gather, and those of `prepare`, `write` and `Evaluation.statistics`.
        """
        with meeting(f"saving the checkpoint of step {run.step}"):
            self.settle()
            where = f"in the BatchNorm statistics of step {run.step}"
            with raised_together(where), fitting(PARTS, where, any_error=False):
                statistics = self._evaluation.statistics(run.network, run.bank) if self._evaluation else {}
            state = self._state_of(run) | ({BATCHNORM: statistics} if statistics else {})
            with agreeing("writing the records to disk", NotSaved):
                if self._place is not None:
                    self._place.check()
                facts = self._session()
            try:
                prepared = prepare(self._folder, run.step, state, facts, self._warn)
                if prepared.is_new and self._background and not last:
                    self._begin(prepared, run.step)
                elif prepared.is_new:
                    write(prepared, self._encoded(prepared, prepared.tensors), place=self._place)
                    self._began(run.step, prepared.path, _in_thread(lambda: self._prune(prepared.path)))
            except OSError as error:  # the same on every rank
                self._check_place()
                self._failed(run.step, error, last)
            if last:
                self.settle(last=True)

    def before_change(self) -> None:
        """Wait until the state that is saved was copied, and warn if a save has failed; call it in each step."""
        if self._command is not None:
            self._command.poll()
        if self._pending is None:
            return
        self._staging.wait()
        future = self._pending[-1]
        # The threads of several ranks end in different steps. So an error that ends the run waits for the next save.
        if future.done() and (world_size() == 1 or isinstance(future.exception(), OSError | None)):
            self.settle()

    def committed(self) -> list[tuple[int, Path]]:
        """Return step and path of the checkpoints committed since the last call, the same on every rank.

        Ranks see the end of a save at different steps, so a checkpoint is returned once all ranks have seen it.

        Collectives: an object all-gather while a checkpoint of the last saves was not returned yet.
        """
        if not self._expected:
            return []
        seen = min(gather(len(self._ended)))
        ended, self._ended = self._ended[:seen], self._ended[seen:]
        self._expected -= seen
        return [checkpoint for checkpoint in ended if checkpoint is not None]

    def _begin(self, prepared: Prepared, step: int) -> None:
        """Copy the state and start the thread that writes the copy."""
        copies = self._staging.begin(prepared.tensors, _only_an_update_changes)
        group = self._group

        def work() -> list[str]:
            with agreeing("copying the state", Exception, group=group):
                self._staging.finish()
            try:
                write(prepared, self._encoded(prepared, copies), group, self._place)
            except OSError:  # the same on every rank
                self._check_place(group)
                raise
            return self._prune(prepared.path)

        self._began(step, prepared.path, _in_thread(work))

    def _state_of(self, run: Run) -> dict[str, Any]:
        """Return what is stored of a run."""
        return state_of(run)

    def _encoded(self, prepared: Prepared, copies: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what is written of the tensors of a checkpoint, or of their copies. No collective."""
        return copies

    def _began(self, step: int, path: Path, future: Future[list[str]]) -> None:
        self._pending = step, path, future
        self._expected += 1

    def _prune(self, newest: Path) -> list[str]:
        """Delete old checkpoints, on rank 0; return warnings."""
        held = () if self._command is None else self._command.held
        return prune(self._folder, newest, self._keep, held) if own_rank() == 0 else []

    def prune_released(self) -> None:
        """Delete the old checkpoints that the command held; call it after the last save, on rank 0."""
        for warning in [] if self._newest is None else self._prune(self._newest):
            self._warn(warning)

    def settle(self, last: bool = False) -> None:
        """Wait for the pending save; report its failure.

        Raises:
            NotSaved: The run directory was moved, or `last` is set and the checkpoint could not be written.
        """
        if self._pending is None:
            return
        (step, path, future), self._pending = self._pending, None
        try:
            for warning in future.result():
                self._warn(warning)
            self._ended.append((step, path))
            self._newest = path
            if self._command is not None:
                self._command.committed(step, path)
        except OSError as error:  # the same on every rank
            self._ended.append(None)
            self._failed(step, error, last)

    def _check_place(self, group: dist.ProcessGroup | None = None) -> None:
        """Raise NotSaved on every rank if the run directory was moved: it is the cause of other errors."""
        with agreeing("looking for the run directory", NotSaved, group=group):
            if self._place is not None:
                self._place.check()

    def _failed(self, step: int, error: OSError, last: bool) -> None:
        failure = NotSaved(f"{self._folder}: step {step} cannot be written: {error.strerror or error}")
        if last:
            raise failure from error
        self._warn(f"warning: {failure}; the training goes on without this checkpoint")


def state_of(run: Run) -> dict[str, Any]:
    """Return the state of a run that a checkpoint stores.

    Data order, noise and dropout are functions of the step, so they have no state.
    """
    scale = {} if run.loss_scale is None else {LOSS_SCALE: run.loss_scale.state()}
    return {
        **training_state(run.network.module, run.optimizer),
        **scale,
        "ema": {name: average.state_dict() for name, average in run.bank.items()},
        "progress": progress_of(run),
    }


def progress_of(run: Run) -> dict[str, Any]:
    """Return the progress of a run as JSON values (`trainer.checkpoint.store.Progress`)."""
    return {
        "step": run.step,
        "samples": run.samples,
        "skipped": int(run.skipped),
        "lr": run.lr(run.step) if run.step else None,
        "averages": list(run.bank),
    }


def _only_an_update_changes(name: str) -> bool:
    """Return whether only the optimizer step and the update of the averages change the tensor of this name."""
    return name.startswith(("optimizer/", "ema/", "change/"))


def _in_thread(work: Callable[[], list[str]]) -> Future[list[str]]:
    """Run `work` in a thread that does not keep the process from ending."""
    future: Future[list[str]] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="checkpoint", daemon=True).start()
    return future
