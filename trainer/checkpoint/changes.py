"""Snapshots of averages in bfloat16 with error feedback: each stores its change from the one before.

The first snapshot of an average is stored whole, in float32. With R_0 for it, snapshot i stores bfloat16(M_i - R_{i-1})
and is read as R_i = R_{i-1} + that. So the rounding of each change is part of the next one, and does not add up.

The tensors of an average are below `ema/NAME/` if they are whole, and below `change/NAME/` if they are changes. The
value `after` of a snapshot is the one before: its step and the SHA-256 of its marker. Where that one is missing or has
another content, the changes after it mean nothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ema.memory import like, local, wrapped_like
from trainer.checkpoint.format import damaged, unreadable
from trainer.checkpoint.store import load_checkpoint, stored_scalars, stored_tensors
from trainer.distributed.processes import agreeing, on_main
from trainer.errors import ConfigError
from trainer.rundir.checkpoints import MARKER, SCALARS, committed, step_of
from trainer.rundir.directory import sha256_of
from trainer.rundir.files import read_text
from trainer.rundir.keys import AVERAGE

CHANGE = "change/"
"""Prefix of the names of changes, in place of `AVERAGE`."""
STORED = torch.bfloat16
"""Dtype of a change."""


Averages = Mapping[str, Mapping[str, Tensor]]
"""State of each average by its name."""


class After(NamedTuple):
    """Snapshot that a snapshot adds its changes to."""

    step: int
    marker: str
    """SHA-256 of its marker."""


def stored_after(path: Path) -> After | None:
    """Return what the changes of a snapshot are added to; None if it has none.

    Raises:
        CheckpointError: `path` is no committed checkpoint, or the value has a wrong type.
    """
    value = stored_scalars(path).get("after")
    if value is None:
        return None
    try:
        after = After(**value)
    except TypeError as error:
        raise damaged(path, SCALARS, f"has a wrong snapshot before it ({error})") from error
    if not (isinstance(after.step, int) and isinstance(after.marker, str)):
        raise damaged(path, SCALARS, "has a snapshot before it of wrong types")
    return after


def after_of(path: Path) -> After:
    """Return what a snapshot stores whose changes are added to this one; the marker has the checksums of all files.

    Raises:
        ConfigError: The marker cannot be read.
    """
    try:
        return After(step_of(path), sha256_of(read_text(path / MARKER)))
    except OSError as error:
        raise unreadable(path, MARKER, error) from error


def without(after: After) -> str:
    """Return what is wrong with a snapshot if the one before it is not there."""
    return f"has changes since the snapshot of step {after.step}, which is missing, damaged or another one"


def as_changes(averages: Averages) -> dict[str, dict[str, Tensor]]:
    """Return uninitialised tensors of the sizes that a snapshot of changes stores."""
    return {
        name: {
            key: like(tensor, STORED, tensor.device) if tensor.dtype is torch.float32 else tensor
            for key, tensor in state.items()
        }
        for name, state in averages.items()
    }


def chain_of(folder: Path, step: int) -> list[Path]:
    """Return the newest snapshot up to a step and those that its changes are added to, oldest first.

    Raises:
        ConfigError: One of them is missing or cannot be read.
    """
    steps = {step_of(path): path for path in committed(folder)}
    newest = max((own for own in steps if own <= step), default=None)
    chain = [] if newest is None else [steps[newest]]
    while chain and (after := stored_after(chain[-1])) is not None:
        before = steps.get(after.step)
        if before is None or after.step >= step_of(chain[-1]) or after_of(before) != after:
            raise ConfigError(f"{chain[-1]} {without(after)}")
        chain.append(before)
    return chain[::-1]


class Feedback:
    """The tensors of a series as its readers rebuild them, this rank's parts in float32 on the host.

    `settle`, `named` and `load` are called by the thread of the training, `encoded` by the one that writes.
    """

    def __init__(self) -> None:
        self._rebuilt: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}
        self.after: After | None = None
        """Newest snapshot that is committed."""

    def settle(self, committed_as: After | None) -> None:
        """Take over what was written last, if it was committed; forget it if it was not, so that no reader needs it."""
        pending, self._pending = self._pending, {}
        if committed_as is None:
            return
        self.after = committed_as
        for key, written in pending.items():
            if written.dtype is STORED:
                self._rebuilt[key].add_(written)
            else:
                self._rebuilt[key] = written

    def named(self, averages: Averages) -> dict[str, Any]:
        """Return the state of a snapshot, whose changes are still the tensors that they lead to."""
        state: dict[str, Any] = {"ema": {}, "change": {}}
        for name, tensors in averages.items():
            changes = {key for key in tensors if self._has(f"{name}/{key}", tensors[key])}
            state["ema"][name] = {key: tensor for key, tensor in tensors.items() if key not in changes}
            state["change"][name] = {key: tensors[key] for key in tensors if key in changes}
        if any(state["change"].values()):
            assert self.after is not None
            state["after"] = self.after._asdict()
        return state

    def _has(self, key: str, tensor: Tensor) -> bool:
        rebuilt = self._rebuilt.get(key)
        return tensor.dtype is torch.float32 and rebuilt is not None and rebuilt.shape == local(tensor).shape

    @torch.no_grad()
    def encoded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors to write: the changes are replaced by what is stored of them."""
        written = {}
        for name, tensor in tensors.items():
            key = name.partition("/")[2]
            if name.startswith(CHANGE):
                change = (local(tensor).cpu() - self._rebuilt[key]).to(STORED)
                self._pending[key] = change
                written[name] = wrapped_like(tensor, change)
            else:
                written[name] = tensor
                if name.startswith(AVERAGE) and tensor.dtype is torch.float32:
                    self._pending[key] = local(tensor).detach().cpu().clone()
        return written

    @torch.no_grad()
    def load(self, chain: Sequence[Path], averages: Averages) -> None:
        """Rebuild the tensors from stored snapshots; nothing changes if one cannot be read.

        Args:
            chain: result of `chain_of`.
            averages: averages whose names, shapes and sharding the tensors get.

        Raises:
            ConfigError: A snapshot is damaged or has other tensors; raised on every rank.

        Collectives: those of `load_checkpoint` for each snapshot.
        """
        wanted = {
            f"{name}/{key}": tensor for name, state in averages.items() for key, tensor in state.items()
        }
        wanted = {key: tensor for key, tensor in wanted.items() if tensor.dtype is torch.float32}
        rebuilt: dict[str, Tensor] = {}
        for path in chain:
            with agreeing("reading a snapshot"):
                stored = stored_tensors(path)
            parts = {
                prefix + key: like(tensor, dtype, torch.device("cpu"))
                for key, tensor in wanted.items()
                for prefix, dtype in ((AVERAGE, torch.float32), (CHANGE, STORED))
                if prefix + key in stored and (prefix == AVERAGE or key in rebuilt)
            }
            load_checkpoint(path, parts)
            for name, part in parts.items():
                key = name.partition("/")[2]
                if name.startswith(CHANGE):
                    rebuilt[key].add_(local(part))
                else:
                    rebuilt[key] = local(part)
        self._rebuilt = rebuilt
        self.after = on_main(lambda: after_of(chain[-1])) if chain else None
