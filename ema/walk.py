"""Canonical names of a model's tensors, and a cached walk over the tensors.

Wrappers (`torch.compile`, activation checkpointing, DDP) add components to names. A parameter must have the same name
under all of them, so these components are removed. Walking `named_parameters()` costs more time than averaging small
tensors. So the walk is done once. Later it is only checked that all modules and parameters are still the same objects.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import getitem, is_
from typing import Any

from torch import Tensor, nn

from ema.background import Background

WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "module"})
"""Name components that wrappers add: torch.compile, activation checkpointing, DataParallel and DDP."""


def canonical(name: str) -> str:
    """Return `name` without the components of wrappers: `module._orig_mod.head.weight` becomes `head.weight`."""
    *path, last = name.split(".")
    return ".".join([part for part in path if part not in WRAPPERS] + [last])


def is_dtensor(tensor: Any) -> bool:
    """Return whether `tensor` is a DTensor. Does not import torch.distributed.tensor, which takes 1.5 s."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, which shares its memory; a plain tensor is returned as it is."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


@dataclass(eq=False)
class Slot:
    """One live tensor with all its names; a tied tensor has several."""

    tensor: Tensor
    names: list[str] = field(default_factory=list)
    sites: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    """Where the tensor is registered: a module's dict of parameters or buffers, and the key in it."""

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]


class Walk:
    """The live tensors of a model: found once, and checked at each `refresh`.

    Attributes:
        root: the model without outer wrappers.
        params: slots of parameters by first name, in the order of the modules.
        buffers: slots of persistent buffers, likewise.
        by_name: slots of both by every name.
        unpublished: names of non-persistent buffers.
        fsdp_modules: modules whose parameters FSDP2 may leave unsharded after a forward.
        version: number of times that the slots were found.
        layouts: the layouts (`ema.layout`) of this version, by the settings that they depend on.
        background: the updates of this model's averages that run in the background.
    """

    def __init__(self, model: nn.Module) -> None:
        self.version = 0
        self.background = Background()
        self.root = _unwrapped(model)
        self._find()

    def __getstate__(self) -> dict[str, Any]:
        # A pickle does not keep the shared memory of views, so the copy makes its own layouts.
        self.background.wait()
        return {**self.__dict__, "layouts": {}}

    def retarget(self, model: nn.Module) -> None:
        """Use `model` from now on. Nothing changes if it is the same model in other wrappers."""
        root = _unwrapped(model)
        if root is not self.root:
            self.background.wait()
            self.root = root
            self._find()

    def refresh(self) -> None:
        """Make the slots equal to the tensors that are registered in the model, sharded. No collective.

        After a forward without backward, FSDP2 has unsharded copies registered, and values written there are lost. So
        the sharded parameters are registered again. If other tensors or modules changed (a new Parameter, `to_empty`, a
        load with assign, a new submodule), all slots are found again.
        """
        if not self._intact():
            self.reshard()
            if not self._intact():
                self.background.wait()
                self._find()
        self._look_at_buffers()

    def _look_at_buffers(self) -> None:
        # A module may assign a new tensor to a buffer at each step.
        for slot, tensor in zip(self.buffers.values(), map(getitem, *self._buffer_sites), strict=True):
            slot.tensor = tensor
            if len(slot.sites) > 1 and any(owner.get(key) is not tensor for owner, key in slot.sites):
                # The buffer was tied before and is not tied now.
                self.background.wait()
                self._find()
                return

    def reshard(self) -> None:
        """Register the sharded parameters of all FSDP2 modules."""
        for module in self.fsdp_modules:
            module.reshard()

    def slots(self) -> Iterator[Slot]:
        """Iterate over all parameters, then over all persistent buffers."""
        yield from self.params.values()
        yield from self.buffers.values()

    def _intact(self) -> bool:
        # There may be thousands of lookups per step, so all loops run in C. The entries must be the expected ones, and
        # there must be no others.
        try:
            return (
                all(map(is_, map(getitem, self._owners, self._keys), self._children))
                and sum(map(len, self._containers)) == len(self._children)
                and sum(map(len, self._buffer_containers)) == self._num_buffers
                and not any(child is None for child in map(getitem, *self._buffer_sites))
            )
        except KeyError:
            return False

    def _find(self) -> None:
        self.version += 1
        self.layouts: dict[Any, Any] = {}
        self.modules = list(self.root.modules())
        self.fsdp_modules: list[Any] = [module for module in self.modules if _is_fsdp(module)]
        self.reshard()
        self.params: dict[str, Slot] = {}
        self.buffers: dict[str, Slot] = {}
        self.by_name: dict[str, Slot] = {}
        self.unpublished: set[str] = set()
        slots_by_id: dict[int, Slot] = {}
        for path, module in self.root.named_modules(remove_duplicate=False):
            prefix = f"{path}." if path else ""
            for key, tensor in module._parameters.items():
                if tensor is not None:
                    self._place(
                        slots_by_id, self.params, canonical(prefix + key), tensor, (module._parameters, key)
                    )
            for key, tensor in module._buffers.items():
                if key in module._non_persistent_buffers_set:
                    self.unpublished.add(canonical(prefix + key))
                elif tensor is not None:
                    self._place(
                        slots_by_id, self.buffers, canonical(prefix + key), tensor, (module._buffers, key)
                    )
        self._remember()

    def _place(
        self,
        slots_by_id: dict[int, Slot],
        table: dict[str, Slot],
        name: str,
        tensor: Tensor,
        site: tuple[dict[str, Any], str],
    ) -> None:
        slot = slots_by_id.get(id(tensor))
        if slot is None:
            slot = slots_by_id[id(tensor)] = Slot(tensor)
        other = self.by_name.setdefault(name, slot)
        if other is not slot:
            raise ValueError(
                f"two different tensors of the model are both called {name!r} without wrapper prefixes"
            )
        if name not in slot.names:
            slot.names.append(name)
        slot.sites.append(site)
        table.setdefault(slot.name, slot)

    def _remember(self) -> None:
        entries = [
            (owner, key, child)
            for module in self.modules
            for owner in (module._modules, module._parameters)
            for key, child in owner.items()
        ]
        self._owners = [owner for owner, _, _ in entries]
        self._keys = [key for _, key, _ in entries]
        self._children: list[Any] = [child for _, _, child in entries]
        self._containers = [
            owner for module in self.modules for owner in (module._modules, module._parameters)
        ]
        self._buffer_containers = [module._buffers for module in self.modules]
        self._num_buffers = sum(map(len, self._buffer_containers))
        sites = [slot.sites[0] for slot in self.buffers.values()]
        self._buffer_sites = [owner for owner, _ in sites], [key for _, key in sites]


def _unwrapped(model: nn.Module) -> nn.Module:
    while not _is_fsdp(model) and len(model._modules) == 1 and not model._parameters and not model._buffers:
        key, child = next(iter(model._modules.items()))
        if key not in WRAPPERS or child is None:
            break
        model = child
    return model


def _is_fsdp(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)
