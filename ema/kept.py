"""Keep the state of a model during a swap, and restore it whatever happened to the model meanwhile."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import cycle
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ema import fsdp
from ema.memory import (
    PLAIN_TENSORS,
    is_dtensor,
    is_plain,
    local,
    place,
    same_bits,
    storage_of,
    writable,
)
from ema.shards import copy_all, part_for
from ema.walk import Walk

INTERNAL = frozenset(nn.Module().__dict__)
"""Attributes of every module: tables of what is registered, hooks, and the mode."""
TABLES = ("_parameters", "_buffers", "_modules")
PLAIN = bool | int | float | complex | str | bytes | torch.dtype | torch.device
CONTAINERS = (list, dict, set)
Tables = list[dict[str, Any]]
"""Copies of a module's tables, in the order of `TABLES`."""


APART = 1 << 20
"""Distance between the counts of writes inside and outside a swap, so that no step outside reaches one of inside."""
_distances = cycle(range(APART, 4000 * APART, APART))
"""Distance of each next swap; no two consecutive ones have the same counts, which have 32 bits."""


class KeptTensor:
    """One parameter or buffer: the registered object, its memory, its values, and autograd's count of writes.

    What autograd saved before the swap has that count, and it may be used again when the values are those of before.
    What it saves inside has another one, and a backward outside refuses it.
    """

    # A model has thousands: each object less is one less for Python's garbage collector.
    __slots__ = (
        "_grad",
        "_grad_memory",
        "_memory",
        "_position",
        "_requires_grad",
        "_size",
        "_spec",
        "_version",
        "name",
        "target",
        "tensor",
        "values",
    )

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.tensor = name, tensor
        memory = self._memory = local(tensor).detach()
        self._position: int | None = None
        self._size = 0
        if is_plain(memory):
            self._position, self._size = memory.data_ptr(), memory.untyped_storage().nbytes()
        self.target = writable(memory)
        self.values = self.target.clone()
        self._version = None if memory.is_inference() else memory._version
        self._spec = tensor._spec if is_dtensor(tensor) else None  # type: ignore[attr-defined]
        self._requires_grad = tensor.requires_grad
        self._grad = tensor.grad if tensor.is_leaf else None
        self._grad_memory = None if self._grad is None else local(self._grad).detach()

    def version_apart(self, distance: int) -> tuple[Tensor, int | None]:
        """Return a tensor and the count for it with which autograd refuses, inside, what was saved elsewhere."""
        return self._memory, None if self._version is None else self._version + distance

    def version_before(self) -> tuple[Tensor, int | None]:
        """Return a tensor and the count that it had before the swap."""
        return self.target, None if self.target.is_inference() else self._version

    def changed_from(self, written: Tensor | None) -> bool:
        """Return whether the values are other than those that the swap has written, or kept if it wrote none."""
        part = local(self.tensor).detach()
        if not _alike(part, self._memory):
            return True
        if written is None:
            return not same_bits(writable(part), self.values)
        return not same_bits(part, part_for(self.tensor, written).to(part.device, part.dtype))

    def in_place(self) -> bool:
        """Return whether the tensor has its memory, shape and dtype, so that `target` can be written."""
        part, memory = local(self.tensor), self._memory
        return (
            self._position is not None
            and part.data_ptr() == self._position
            and part.untyped_storage().nbytes() == self._size
            and part.dtype is memory.dtype
            and part.shape == memory.shape
            and part.stride() == memory.stride()
        )

    def restore_memory(self) -> bool:
        """Give the tensor its memory, shape and dtype back.

        Returns:
            Whether FSDP2 must adopt it.
        """
        converted = not _alike(local(self.tensor), self._memory)
        if is_dtensor(self.tensor):
            if converted:
                fsdp.give_back(self.tensor, self._memory, self._spec)  # type: ignore[arg-type]
            # FSDP2 may have moved the shard to other memory.
            self.target = local(self.tensor).detach()
        elif converted or place(self.tensor) != place(self._memory):
            self.tensor.data = self._memory
        _regrow(self.target)
        return converted and is_dtensor(self.tensor)

    def restore_grad(self) -> None:
        """Give the tensor its gradient, and its flag for that, back if they were converted."""
        grad, memory = self._grad, self._grad_memory
        if grad is not None and memory is not None:
            if not is_dtensor(grad) and grad.dtype != memory.dtype:
                grad.data = memory
            if self.tensor.grad is not None and self.tensor.grad.dtype != grad.dtype:
                self.tensor.grad = grad
        if self.tensor.requires_grad is not self._requires_grad and self.tensor.is_leaf:
            self.tensor.requires_grad_(self._requires_grad)

    def has_values(self) -> bool:
        """Return whether the memory has the kept values."""
        return same_bits(self.target, self.values)


class KeptModule:
    """One module: its class, all its attributes, and the elements of those that are lists, dicts or sets."""

    __slots__ = ("_class", "_elements", "_empty", "_properties", "_values", "module")

    def __init__(self, module: nn.Module, properties: dict[str, property]) -> None:
        self.module = module
        self._class = type(module)
        self._properties = properties
        self._values = dict(module.__dict__)
        self._elements: dict[str, Any] = {}
        self._empty: list[Any] = []
        for name, value in self._values.items():
            if isinstance(value, CONTAINERS):
                if value:
                    self._elements[name] = _copy(value)
                else:
                    self._empty.append(value)

    def differs(self) -> bool:
        """Return whether anything but the mode is other than before; it may be equal."""
        module, before, own = self.module, self._values, self.module.__dict__
        if "training" in own:
            before["training"] = own["training"]
        return not (
            type(module) is self._class
            and len(own) == len(before)
            and all(map(is_, own.values(), before.values()))
            and not any(self._empty)
            and all([_same(_copy(before[name]), elements) for name, elements in self._elements.items()])
        )

    @property
    def tables(self) -> Tables:
        """What was registered: copies of the tables, in the order of `TABLES`."""
        # The tables of a scripted module are no dicts, and cannot change.
        return [
            self._elements.get(name, {}) if isinstance(self._values.get(name), dict) else table
            for name, table in zip(TABLES, _registered(self.module), strict=True)
        ]

    def has_attributes(self) -> bool:
        """Return whether the attributes that only this class has are as before."""
        now, before = _own(self.module.__dict__), _own(self._values)
        return _same(now, before) and _same(_elements(now), _own(self._elements))

    def restore_registered(self) -> bool:
        """Give the module its class and its registered objects back, and its hooks if these objects were others.

        Returns:
            Whether other objects were registered.
        """
        module = self.module
        if type(module) is not self._class:
            module.__class__ = self._class
        for name in self._properties.keys() - self._class.__dict__.keys():
            setattr(self._class, name, self._properties[name])
        replaced = not _same(_registered(module), self.tables)
        if replaced:
            self._restore(INTERNAL.intersection(self._values) - {"training"})
        return replaced

    def restore_attributes(self) -> None:
        """Give the module the attributes back that only its class has."""
        for name in self.module.__dict__.keys() - self._values.keys():
            del self.module.__dict__[name]
        self._restore(_own(self._values))

    def _restore(self, names: Iterable[str]) -> None:
        for name in names:
            value = self.module.__dict__[name] = self._values[name]
            if isinstance(value, CONTAINERS):
                _fill(value, self._elements.get(name, ()))


class Kept:
    """The state of all modules of a walk: what is registered, all values, and plain attributes.

    Memory: a copy of all parameters and buffers, of sharded ones this rank's part.
    """

    def __init__(self, walk: Walk) -> None:
        self._walk = walk
        properties = {cls: _properties(cls) for cls in {type(module) for module in walk.modules}}
        self._modules = [KeptModule(module, properties[type(module)]) for module in walk.modules]
        self._tensors: dict[int, KeptTensor] = {}
        for path, module in walk.paths:
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and id(tensor) not in self._tensors and _has_values(tensor):
                    self._tensors[id(tensor)] = KeptTensor(f"{path}.{key}" if path else key, tensor)
        self._inside: dict[int, Tables] = {}
        """What was registered after the swap by id of the module, if it registered something."""
        self._written: Mapping[int, Tensor] = {}

    def settle(self, written: Mapping[int, Tensor], *, registered: bool) -> None:
        """Take the present state as that of the swap.

        Args:
            written: new values by id of the tensor.
            registered: whether the swap has registered other tensors.
        """
        self._written = written
        if registered:
            self._inside = {id(kept.module): _registered(kept.module) for kept in self._modules}
        distance = next(_distances)
        _set_versions(kept.version_apart(distance) for kept in self._tensors.values())

    def restore(self) -> list[tuple[str, Exception]]:
        """Restore everything that can be restored, and return the errors with the names of what they are about."""
        errors: list[tuple[str, Exception]] = []

        def attempt(name: str, action: Callable[[], Any]) -> Any:
            try:
                return action()
            except Exception as error:
                errors.append((name, error))
                return None

        # A forward inside leaves the root of FSDP2 unsharded. The sharded parameters must be registered again.
        attempt("FSDP2", lambda: fsdp.reshard(self._walk.fsdp_modules))
        differing = [
            kept for kept in self._modules if attempt(type(kept.module).__name__, kept.differs) is not False
        ]
        touched = attempt("attributes", lambda: self._touched(differing)) or []
        replaced = [attempt(type(kept.module).__name__, kept.restore_registered) for kept in differing]
        converted, pending = False, []
        for number, tensor in self._tensors.items():
            try:
                if not tensor.in_place():
                    converted |= tensor.restore_memory()
                tensor.restore_grad()
                if number in self._written or not tensor.has_values():
                    pending.append(tensor)
            except Exception as error:
                errors.append((tensor.name, error))
        try:
            copy_all([(tensor.target, tensor.values) for tensor in pending])
        except Exception:
            for tensor in pending:
                attempt(tensor.name, partial(copy_all, [(tensor.target, tensor.values)]))
        attempt("autograd", lambda: _set_versions(kept.version_before() for kept in self._tensors.values()))
        if any(replaced) or converted:
            attempt("FSDP2", lambda: fsdp.adopt(self._walk.fsdp_modules))
        for kept in touched:
            attempt(type(kept.module).__name__, kept.restore_attributes)
        return errors

    def _touched(self, differing: list[KeptModule]) -> list[KeptModule]:
        """Return modules whose tensors and other attributes have both changed.

        An example is a layer that merged another one's weights into its own and has a flag for it.
        """
        found = []
        inside: dict[int, Tables] = {}
        for kept in differing:
            if not kept.has_attributes():
                inside = inside or {id(one.module): one.tables for one in self._modules} | self._inside
                children = (child for child in kept.module._modules.values() if child is not None)
                if any(
                    self._is_changed(member, inside.get(id(member))) for member in (kept.module, *children)
                ):
                    found.append(kept)
        return found

    def _is_changed(self, module: nn.Module, inside: Tables | None) -> bool:
        if inside is None or not _same(_registered(module), inside):
            return True
        kept = (self._tensors.get(id(tensor)) for table in inside[:2] for tensor in table.values())
        return any(one.changed_from(self._written.get(id(one.tensor))) for one in kept if one is not None)


def _own(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in INTERNAL}


def _elements(values: dict[str, Any]) -> dict[str, Any]:
    """Return copies of the lists, dicts and sets that are not empty, by name."""
    return {name: _copy(value) for name, value in values.items() if isinstance(value, CONTAINERS) and value}


def _base(container: Any) -> Any:
    # A subclass may have methods of its own that do something else.
    return next(cls for cls in type(container).__mro__ if cls in (OrderedDict, *CONTAINERS))


def _copy(container: Any) -> Any:
    if type(container) is dict:
        return container.copy()
    base = _base(container)
    return dict(base.items(container)) if issubclass(base, dict) else base.copy(container)


def _fill(container: Any, elements: Any) -> None:
    base = _base(container)
    base.clear(container)
    (base.extend if base is list else base.update)(container, elements)


def _same(one: Any, other: Any) -> bool:
    """Return whether two values are one object, equal plain values, or lists or dicts of such values."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        same = len(one) == len(other) and all(map(is_, one.values(), other.values()))
        return list(one) == list(other) and (same or all(map(_same, one.values(), other.values())))
    return isinstance(one, PLAIN | set) and bool(one == other)


def _properties(cls: type[nn.Module]) -> dict[str, property]:
    """Return the properties of a module's class, which a parametrization removes with the last tensor."""
    return {name: value for name, value in cls.__dict__.items() if isinstance(value, property)}


def _registered(module: nn.Module) -> Tables:
    return [dict(getattr(module, name)) for name in TABLES]


def _has_values(tensor: Tensor) -> bool:
    """Return whether values can be kept: of no lazy, meta or nested tensor, and of no wrapper around tensors."""
    if is_plain(tensor):
        return True
    if is_lazy(tensor) or tensor.is_meta or tensor.is_nested:
        return False
    part = local(tensor)
    return type(part) in PLAIN_TENSORS or not part.numel() or storage_of(part) is not None


def _set_versions(counts: Iterable[tuple[Tensor, int | None]]) -> None:
    """Set autograd's counts of writes; None leaves a tensor's count."""
    known = [(tensor, count) for tensor, count in counts if count is not None]
    if known:
        tensors, versions = zip(*known, strict=True)
        torch._C._autograd._unsafe_set_version_counter(tensors, versions)


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device, one.layout) == (
        other.shape,
        other.dtype,
        other.device,
        other.layout,
    )


def _regrow(tensor: Tensor) -> None:
    """Give a storage that was shrunk meanwhile its size back."""
    if tensor.layout is torch.strided and not tensor.is_nested and tensor.numel():
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        needed = int(tensor.storage_offset() + last + 1) * tensor.element_size()
        if tensor.untyped_storage().nbytes() < needed:
            tensor.untyped_storage().resize_(needed)
