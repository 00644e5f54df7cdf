"""Buffers of a model, which a training forward changes without a gradient: BatchNorm statistics, running means, queues.

Three rules make them a pure function of the step, as the weights are:

* A step that is skipped gives them back the values from before the step.
* After a step every rank has the same values: of the statistics of norms the mean over the ranks, of all other
  persistent buffers the values of rank 0, as DDP broadcasts them.
* A forward that activation checkpointing repeats does not change them a second time.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase

from trainer.distributed.processes import world_size

_MEANS = ("running_mean", "running_var")
"""Buffers of norms whose mean over the ranks is the statistic of all samples."""
_OF_NORMS = (*_MEANS, "num_batches_tracked")


class _Site(NamedTuple):
    """Place of a buffer in its module."""

    owner: dict[str, Tensor | None]
    name: str
    persistent: bool
    of_norm: bool
    """Whether it is one of torch's own buffers of a norm with running statistics."""

    def tensor(self) -> Tensor | None:
        """Return this rank's part of the buffer, or None if it is not set."""
        value: Any = self.owner.get(self.name)
        return value.to_local() if isinstance(value, DTensor) else value


class _Saved(NamedTuple):
    """Value of a buffer before a step."""

    site: _Site
    value: Tensor | None
    """The tensor in the module before the step."""
    tensor: Tensor | None
    """This rank's part of it."""
    copy: Tensor | None
    """Copy of that part; None if it is no dense tensor."""


class TrainingBuffers:
    """Buffers of one model, looked up in its modules each time, because a forward may replace them.

    Args:
        module: model, after sharding; the process group exists already, if there are several ranks.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        self._saved: list[_Saved] = []
        self._ranks = world_size()

    def save(self) -> None:
        """Copy the buffers before the forwards of a step. No collective, no wait for the device.

        Buffers that hold no state are left out: those that are neither persistent nor floating-point. Sparse and nested
        ones are kept, not copied: they are restored if a forward replaces them, not if it writes into them.
        """
        saved = []
        for site in _sites(self._modules):
            tensor = site.tensor()
            if tensor is None or site.persistent or tensor.is_floating_point() or tensor.is_complex():
                saved.append((site, tensor))
        copies = iter(_copies([tensor for _, tensor in saved if _is_dense(tensor)]))
        self._saved = [
            _Saved(site, site.owner[site.name], tensor, next(copies) if _is_dense(tensor) else None)
            for site, tensor in saved
        ]

    @torch.no_grad()
    def restore_unless(self, finite: Tensor) -> None:
        """Give the buffers the values of the last `save` if the step is skipped.

        Args:
            finite: whether the step is taken; 0-dimensional bool, equal on all ranks. On a GPU the host reads it only
                if a forward has changed the shape or dtype of a buffer.
        """
        saved, self._saved = self._saved, []
        on_host = finite.device.type == "cpu"
        if not saved or (on_host and finite):
            return
        now = [one.site.tensor() for one in saved]
        pairs = list(zip(saved, now, strict=True))
        if not on_host and all(_alike(one, tensor) for one, tensor in pairs):
            _select(finite, [(tensor, one.copy) for one, tensor in pairs])
        elif not finite:
            for one in saved:
                one.site.owner[one.site.name] = one.value
                if one.tensor is not None and one.copy is not None and not _overlaps(one.tensor):
                    one.tensor.copy_(one.copy)

    @torch.no_grad()
    def share(self) -> None:
        """Make the buffers of all ranks equal after a step.

        Collectives: those of `average_statistics`, and one broadcast for each dtype of the other persistent buffers
        that are dense; none in a single process.
        """
        if self._ranks == 1:
            return
        self.average_statistics()
        others = [
            site.tensor()
            for site in _sites(self._modules)
            if site.persistent and not site.of_norm and not _is_sharded(site)
        ]
        for group in _by_kind(tensor for tensor in others if _is_dense(tensor)):
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            dist.broadcast(flat.view(torch.uint8), 0)  # as bytes: no backend knows all dtypes
            _write(group, flat)

    @torch.no_grad()
    def average_statistics(self) -> None:
        """Replace the running means and variances of all norms by their mean over the ranks.

        Collectives: one all-reduce for float64 statistics and one for all others, if there are such and several ranks.
        """
        if self._ranks == 1:
            return
        found = (site.tensor() for site in _sites(self._modules) if site.of_norm and site.name in _MEANS)
        statistics = [tensor for tensor in found if tensor is not None]
        wide = [tensor for tensor in statistics if tensor.dtype == torch.float64]
        others = [tensor for tensor in statistics if tensor.dtype != torch.float64]
        for group, dtype in ((others, torch.float32), (wide, torch.float64)):
            if group:
                flat = torch.cat([tensor.reshape(-1).to(dtype) for tensor in group])
                dist.all_reduce(flat)
                _write(group, flat / self._ranks)


class _Repeated(AbstractContextManager[None]):
    """Context in which the buffers of a block have their values from before its first forward.

    Copies take the place of the buffers, so the repeated forward changes the copies only, and computes what the first
    one did. It may be entered again, by a second backward of the same graph.

    Args:
        block: module whose forward is repeated, before its first forward.
    """

    def __init__(self, block: nn.Module) -> None:
        self._before = [
            (site, value, value.detach().clone())
            for site in _sites(block.modules())
            if (value := site.owner[site.name]) is not None
        ]
        self._kept: list[Tensor | None] = []

    def __enter__(self) -> None:
        self._kept = [site.owner[site.name] for site, _, _ in self._before]
        copies: dict[int, Tensor] = {}  # by the id of the buffer, because two modules may share one
        for site, value, before in self._before:
            site.owner[site.name] = copies.setdefault(id(value), before.clone())

    def __exit__(self, *error: object) -> None:
        for (site, _, _), value in zip(self._before, self._kept, strict=True):
            site.owner[site.name] = value
        self._kept = []


def repeated_once(
    block: nn.Module,
) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """Return the `context_fn` of `torch.utils.checkpoint.checkpoint` for a block that has buffers."""
    return lambda: (nullcontext(), _Repeated(block))


def _sites(modules: Iterable[nn.Module]) -> Iterator[_Site]:
    """Yield the places of all buffers; a shared buffer has several."""
    for module in [module for module in modules if module._buffers]:  # most modules have none
        for name in module._buffers:
            persistent = name not in module._non_persistent_buffers_set
            of_norm = isinstance(module, _NormBase) and name in _OF_NORMS
            yield _Site(module._buffers, name, persistent, of_norm)


def _is_sharded(site: _Site) -> bool:
    return isinstance(site.owner.get(site.name), DTensor)


def _overlaps(tensor: Tensor) -> bool:
    """Return whether elements share memory, as after `expand`; nothing can be written into such a tensor."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _is_dense(tensor: Tensor | None) -> TypeGuard[Tensor]:
    """Return whether there is a tensor that can be joined with others into a flat one: not a sparse or nested one."""
    return tensor is not None and tensor.layout is torch.strided and not tensor.is_nested


def _alike(saved: _Saved, tensor: Tensor | None) -> bool:
    """Return whether the copy can be written into the tensor, or nothing is to be written."""
    copy = saved.copy
    if copy is None or tensor is None:
        return saved.tensor is tensor
    return (copy.shape, copy.dtype, copy.device) == (tensor.shape, tensor.dtype, tensor.device)


def _by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return the tensors in groups of one dtype and device, in the order of their first ones."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(groups.values())


@torch.no_grad()
def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """Return copies of the tensors, made by one operation for each dtype and device."""
    copies: dict[int, Tensor] = {}
    for group in _by_kind(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        copies |= {id(tensor): part for tensor, part in zip(group, _parts(group, flat), strict=True)}
    return [copies[id(tensor)] for tensor in tensors]


def _select(finite: Tensor, pairs: Iterable[tuple[Tensor | None, Tensor | None]]) -> None:
    """Write the copy into the tensor of each pair unless `finite`, without waiting for the device."""
    copy_of = {tensor: copy for tensor, copy in pairs if tensor is not None and copy is not None}
    for group in _by_kind(copy_of):
        now = torch.cat([tensor.reshape(-1) for tensor in group])
        before = torch.cat([copy_of[tensor].reshape(-1) for tensor in group])
        _write(group, torch.where(finite.to(now.device), now, before))


def _write(tensors: list[Tensor], flat: Tensor) -> None:
    """Write consecutive parts of a flat tensor into the tensors."""
    pairs = [pair for pair in zip(tensors, _parts(tensors, flat), strict=True) if not _overlaps(pair[0])]
    if pairs:
        torch._foreach_copy_([tensor for tensor, _ in pairs], [part for _, part in pairs])


def _parts(tensors: list[Tensor], flat: Tensor) -> list[Tensor]:
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
