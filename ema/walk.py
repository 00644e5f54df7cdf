"""The live tensors of a model by canonical name, in a cached walk.

Walking `named_parameters()` costs more time than averaging small tensors. So the walk is done once. Later it is only
checked that all modules and parameters are still the same objects. This module also records which average is swapped
into which model, because the tensors of such a model are not the live weights.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from operator import getitem, is_
from typing import Any

import torch
from torch import Tensor, nn

from ema import fsdp
from ema.background import Background
from ema.memory import place, storage_of
from ema.names import named_modules, wrapped

Site = tuple[dict[str, Any], str]
"""Where a tensor is registered: a module's dict of parameters or buffers, and the key in it."""


@dataclass(eq=False)
class Slot:
    """One live tensor with all its names; a tied tensor has several, and so have tensors that share all elements."""

    tensor: Tensor
    names: list[str] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]


class Walk:
    """The live tensors of a model: found once, and checked at each `refresh`.

    Attributes:
        root: the model without outer wrappers.
        paths: modules with their canonical paths; a shared module has several.
        modules: all modules, each once.
        params: slots of parameters by first name, in the order of the modules.
        buffers: slots of persistent buffers, likewise, except those that share all elements with a parameter.
        by_name: slots of both by every name.
        absent: sites of persistent buffers that are None, by name.
        unpublished: names of non-persistent buffers.
        fsdp_modules: modules whose parameters FSDP2 may leave unsharded after a forward.
        version: number of times that the slots were found.
        layouts: the layouts (`ema.layout`) of this version, by the settings that they depend on.
        background: the updates of this model's averages that run in the background.
    """

    def __init__(self, model: nn.Module) -> None:
        self.version = 0
        self.background = Background()
        self._find(_unwrapped(model))

    def __getstate__(self) -> dict[str, Any]:
        # A pickle does not keep the shared memory of views, so the copy makes its own layouts.
        self.background.wait()
        return {**self.__dict__, "layouts": {}}

    def refuse_swapped(self, action: str) -> None:
        """Raise a RuntimeError if an average is swapped into the model, so that its weights are not the live ones."""
        if _swaps and any(swap.is_in(self.modules) for swap in _swaps):
            raise RuntimeError(
                f"cannot {action} while an average is swapped into the model: its weights are not the live ones"
            )

    def follow(self, model: nn.Module, action: str) -> None:
        """Use `model` from now on, perhaps the same one in other wrappers, and `refresh`; `action` is for messages.

        Raises:
            RuntimeError: An average is swapped into it.
        """
        root = model if model is self.root else _unwrapped(model)
        if root is not self.root:
            self.background.wait()
            self._find(root)
        self.refuse_swapped(action)
        self.refresh()

    @contextmanager
    def kept_on_error(self) -> Iterator[None]:
        """Use the model of before again if an exception leaves the context."""
        before = self.snapshot()
        try:
            yield
        except BaseException:
            self.go_back(before)
            raise

    def snapshot(self) -> dict[str, Any]:
        """Return what `go_back` needs; an update has no time for a context, nor for a copy."""
        return self.__dict__

    def go_back(self, before: dict[str, Any]) -> None:
        """Use the model of the snapshot again."""
        self.__dict__ = before

    def refresh(self) -> None:
        """Make the slots equal to the tensors that are registered in the model, sharded. No collective.

        After a forward without backward, FSDP2 has unsharded copies registered, and values written there are lost. So
        the sharded parameters are registered again. If other tensors or modules changed (a new Parameter, `to_empty`, a
        load with assign, a new submodule), all slots are found again.
        """
        if not self._intact():
            self.reshard()
            if not self._intact():
                self._find_again()
                return
        # They were one tensor or shared all elements before, and may not now.
        untied = any([owner.get(key) is not slot.tensor for slot, (owner, key) in self._tied_buffers])
        if untied or any([place(owner[key]) != place(slot.tensor) for slot, (owner, key) in self._aliases]):
            self._find_again()

    def _find_again(self) -> None:
        self.background.wait()
        self._find(self.root)

    def reshard(self) -> None:
        """Register the sharded parameters of all FSDP2 modules."""
        fsdp.reshard(self.fsdp_modules)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the first floating-point parameter."""
        tensors = (slot.tensor for slot in self.params.values())
        return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)

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
                and all(map(is_, map(getitem, *self._absent_sites), repeat(None)))
                and self._follow_buffers()
            )
        except KeyError:
            return False

    def _follow_buffers(self) -> bool:
        """Take the buffers that are registered now; return False if one is None now."""
        present: list[Any] = list(map(getitem, *self._buffer_sites))
        # A module may assign a new tensor to a buffer at each step.
        if not all(map(is_, present, self._present_buffers)):
            if any(map(is_, present, repeat(None))):
                return False
            self._present_buffers[:] = present
            for slot, tensor in zip(self.buffers.values(), present, strict=True):
                slot.tensor = tensor
        return True

    def _find(self, root: nn.Module) -> None:
        # The attributes of before stay as they are, for `go_back`.
        self.__dict__ = dict(self.__dict__)
        self.root = root
        self.version += 1
        self.layouts: dict[Any, Any] = {}
        self.modules = list(self.root.modules())
        self.fsdp_modules: list[Any] = [module for module in self.modules if fsdp.is_fsdp(module)]
        self.reshard()
        self.params: dict[str, Slot] = {}
        self.buffers: dict[str, Slot] = {}
        self.by_name: dict[str, Slot] = {}
        self.absent: dict[str, Site] = {}
        self.unpublished: set[str] = set()
        self._slots_by_place: dict[Any, Slot] = {}
        self.paths = list(named_modules(self.root))
        for path, module in self.paths:
            fsdp.refuse_foreign_sharding(path, module)
            prefix = f"{path}." if path else ""
            for key, tensor in module._parameters.items():
                if tensor is not None:
                    self._place(self.params, prefix + key, tensor, (module._parameters, key))
        for path, module in self.paths:
            prefix = f"{path}." if path else ""
            for key, buffer in module._buffers.items():
                if key in module._non_persistent_buffers_set:
                    self.unpublished.add(prefix + key)
                elif buffer is None:
                    self.absent[prefix + key] = (module._buffers, key)
                else:
                    self._place(self.buffers, prefix + key, buffer, (module._buffers, key))
        del self._slots_by_place
        self._remember()

    def _place(self, table: dict[str, Slot], name: str, tensor: Tensor, site: Site) -> None:
        slots, where = self._slots_by_place, place(tensor)
        slot = slots.get(id(tensor)) or (None if where is None else slots.get(where))
        if slot is None:
            slot = Slot(tensor)
            table[name] = slot
        slots[id(tensor)] = slot
        if where is not None:
            slots[where] = slot
        if tensor.requires_grad and not slot.tensor.requires_grad:
            # A frozen parameter may share all elements with one that is trained.
            slot.tensor = tensor
        other = self.by_name.setdefault(name, slot)
        if other is not slot:
            raise ValueError(
                f"two different tensors of the model are both called {name!r} without wrapper prefixes"
            )
        if name not in slot.names:
            slot.names.append(name)
        slot.sites.append(site)

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
        self._present_buffers: list[Any] = [owner[key] for owner, key in sites]
        for slot, buffer in zip(self.buffers.values(), self._present_buffers, strict=True):
            slot.tensor = buffer
        self._buffer_sites: tuple[list[Any], list[str]] = (
            [owner for owner, _ in sites],
            [key for _, key in sites],
        )
        self._absent_sites = (
            [owner for owner, _ in self.absent.values()],
            [key for _, key in self.absent.values()],
        )
        self._tied_buffers = [
            (slot, (owner, key))
            for slot in self.buffers.values()
            for owner, key in slot.sites[1:]
            if owner[key] is slot.tensor
        ]
        self._aliases = [
            (slot, (owner, key))
            for slot in self.slots()
            for owner, key in slot.sites
            if owner[key] is not slot.tensor
        ]


def _unwrapped(model: nn.Module) -> nn.Module:
    while (inner := wrapped(model)) is not None and not fsdp.is_fsdp(model):
        _, model = inner
    return model


@dataclass(eq=False)
class Swap:
    """An average that is swapped into a model now.

    Attributes:
        average: the average.
        modules: modules of the model; the reference keeps them alive, so their ids are unique.
        storages: storages of the tensors that are written; another model may share them.
    """

    average: Any
    modules: list[nn.Module]
    storages: set[int | None]

    def __post_init__(self) -> None:
        self.ids = {id(module) for module in self.modules}

    def is_in(self, modules: Iterable[nn.Module]) -> bool:
        """Return whether the average is in one of the modules, or in a tensor of one of them."""
        modules = list(modules)
        return any(id(module) in self.ids for module in modules) or any(
            storage_of(tensor) in self.storages
            for module in modules
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        )


_swaps: list[Swap] = []


def is_swapped(model: nn.Module) -> bool:
    """Return whether an average is in `model` or a part of it; then its weights are not the live ones."""
    return any(swap.is_in(model.modules()) for swap in _swaps)


def is_in_use(average: Any) -> bool:
    """Return whether `average` is swapped into a model now."""
    return any(swap.average is average for swap in _swaps)


@contextmanager
def in_use(average: Any, modules: list[nn.Module], storages: set[int | None]) -> Iterator[None]:
    """Count `average` as swapped into the modules inside the context; arguments as the fields of `Swap`."""
    swap = Swap(average, modules, storages - {None})
    _swaps.append(swap)
    try:
        yield
    finally:
        _swaps.remove(swap)
