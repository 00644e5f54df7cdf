"""Keep the state of a model during a swap, and restore it whatever happened to the model meanwhile."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ema import fsdp
from ema.memory import is_dtensor, local, place, same_bits, storage_of, writable
from ema.shards import part_for
from ema.walk import Walk

INTERNAL = frozenset(nn.Module().__dict__)
"""Attributes of every module: tables of what is registered, hooks, and the mode."""
TABLES = ("_parameters", "_buffers", "_modules")
HOOKS = INTERNAL.difference(TABLES)
PLAIN = bool | int | float | complex | str | bytes | torch.dtype | torch.device


APART = 1 << 20
"""Distance between the counts of writes inside and outside a swap, so that no step outside reaches one of inside."""


class KeptTensor:
    """One parameter or buffer: the registered object, its memory, its values, and autograd's count of writes.

    What autograd saved before the swap has that count, and it may be used again when the values are those of before.
    What it saves inside has another one, and a backward outside refuses it.
    """

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.tensor = name, tensor
        self._memory = local(tensor).detach()
        self._target = writable(self._memory)
        self._values = self._target.clone()
        self._version = None if self._memory.is_inference() else self._memory._version
        self._spec = tensor._spec if is_dtensor(tensor) else None  # type: ignore[attr-defined]
        self._requires_grad = tensor.requires_grad
        self._grad = tensor.grad if tensor.is_leaf else None
        self._grad_memory = None if self._grad is None else local(self._grad).detach()

    def count_apart(self) -> None:
        """Let autograd refuse in the other place what it has saved inside or outside the swap."""
        if self._version is not None:
            _set_version(self._memory, self._version + APART)

    def changed_from(self, written: Tensor | None) -> bool:
        """Return whether the values are other than those that the swap has written, or kept if it wrote none."""
        part = local(self.tensor)
        if not _alike(part, self._memory):
            return True
        if written is None:
            return not same_bits(writable(part), self._values)
        return not same_bits(part, part_for(self.tensor, written).to(part.device, part.dtype))

    def restore(self, *, always: bool) -> bool:
        """Give the tensor its memory and its values back.

        Args:
            always: whether to write the values without comparing them, as after the swap has written others.

        Returns:
            Whether FSDP2 must adopt it.
        """
        converted = not _alike(local(self.tensor), self._memory)
        target = self._target
        if is_dtensor(self.tensor):
            if converted:
                fsdp.give_back(self.tensor, self._memory, self._spec)  # type: ignore[arg-type]
            # FSDP2 may have moved the shard to other memory.
            target = local(self.tensor).detach()
        elif converted or place(self.tensor) != place(self._memory):
            self.tensor.data = self._memory
        self._restore_grad()
        if self.tensor.requires_grad is not self._requires_grad and self.tensor.is_leaf:
            self.tensor.requires_grad_(self._requires_grad)
        with torch.inference_mode(target.is_inference()), torch.no_grad():
            _regrow(target)
            if always or not same_bits(target, self._values):
                target.copy_(self._values)
        if self._version is not None and not target.is_inference():
            _set_version(target, self._version)
        return converted and is_dtensor(self.tensor)

    def _restore_grad(self) -> None:
        grad, memory = self._grad, self._grad_memory
        if grad is None or memory is None:
            return
        if not is_dtensor(grad) and grad.dtype != memory.dtype:
            grad.data = memory
        if self.tensor.grad is not None and self.tensor.grad.dtype != grad.dtype:
            self.tensor.grad = grad


class Kept:
    """The state of all modules of a walk: what is registered, all values, and plain attributes.

    Memory: a copy of all parameters and buffers, of sharded ones this rank's part.
    """

    def __init__(self, walk: Walk) -> None:
        self._walk = walk
        self._modules = list(walk.modules)
        self._classes = [(type(module), _properties(module)) for module in self._modules]
        self._hooks = [_contents(module, HOOKS) for module in self._modules]
        self._registered = [_registered(module) for module in self._modules]
        self._attributes = [_contents(module, module.__dict__.keys() - INTERNAL) for module in self._modules]
        self._tensors: dict[int, KeptTensor] = {}
        for path, module in walk.paths:
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and _has_values(tensor):
                    name = f"{path}.{key}" if path else key
                    self._tensors.setdefault(id(tensor), KeptTensor(name, tensor))
        self._inside = self._registered
        self._written: Mapping[int, Tensor] = {}

    def settle(self, written: Mapping[int, Tensor]) -> None:
        """Take the present state as that of the swap.

        Args:
            written: new values by id of the tensor.
        """
        self._inside, self._written = [_registered(module) for module in self._modules], written
        for kept in self._tensors.values():
            kept.count_apart()

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
        touched = attempt("attributes", self._touched) or []
        states = zip(self._modules, self._classes, self._hooks, self._registered, strict=True)
        replaced = [attempt(type(state[0]).__name__, partial(_register, *state)) for state in states]
        converted = [
            attempt(kept.name, partial(kept.restore, always=number in self._written))
            for number, kept in self._tensors.items()
        ]
        if any(replaced) or any(converted):
            attempt("FSDP2", lambda: fsdp.adopt(self._walk.fsdp_modules))
        for module, attributes in touched:
            for name in module.__dict__.keys() - INTERNAL - attributes.keys():
                del module.__dict__[name]
            attempt(type(module).__name__, partial(_set_contents, module, attributes))
        return errors

    def _touched(self) -> list[tuple[nn.Module, "Contents"]]:
        """Return modules whose tensors and other attributes have both changed, with their attributes of before.

        An example is a layer that merged another one's weights into its own and has a flag for it.
        """
        found = []
        tables = {id(module): tables for module, tables in zip(self._modules, self._inside, strict=True)}
        for module, before in zip(self._modules, self._attributes, strict=True):
            now = _contents(module, module.__dict__.keys() - INTERNAL)
            if not _same(now, before):
                family = [module, *(child for child in module._modules.values() if child is not None)]
                if any(self._is_changed(member, tables.get(id(member))) for member in family):
                    found.append((module, before))
        return found

    def _is_changed(self, module: nn.Module, inside: list[dict[str, Any]] | None) -> bool:
        if inside is None or not all(map(_same, _registered(module), inside)):
            return True
        kept = (self._tensors.get(id(tensor)) for table in inside[:2] for tensor in table.values())
        return any(one.changed_from(self._written.get(id(one.tensor))) for one in kept if one is not None)


Contents = dict[str, tuple[Any, Any]]
"""Attributes of a module by name: each value, and a copy of its elements if it is a list, dict or set."""


def _contents(module: nn.Module, names: Collection[str]) -> Contents:
    values = {name: value for name, value in module.__dict__.items() if name in names}
    return {
        name: (value, value.copy() if isinstance(value, list | dict | set) else None)
        for name, value in values.items()
        if name != "training"
    }


def _set_contents(module: nn.Module, before: Contents) -> None:
    for name, (value, elements) in before.items():
        module.__dict__[name] = value
        if isinstance(value, list):
            value[:] = elements
        elif isinstance(value, dict | set):
            value.clear()
            value.update(elements)


def _same(one: Any, other: Any) -> bool:
    """Return whether two values are one object, equal plain values, or lists or dicts of such values."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(_same, one.values(), other.values()))
    return isinstance(one, PLAIN | set) and bool(one == other)


def _properties(module: nn.Module) -> dict[str, property]:
    """Return the properties of the module's own class, which a parametrization removes with the last tensor."""
    return {name: value for name, value in type(module).__dict__.items() if isinstance(value, property)}


def _registered(module: nn.Module) -> list[dict[str, Any]]:
    return [dict(getattr(module, table)) for table in TABLES]


def _register(
    module: nn.Module,
    kind: tuple[type[nn.Module], dict[str, property]],
    hooks: Contents,
    tables: list[dict[str, Any]],
) -> bool:
    """Give a module its class and its registered objects back, and its hooks if these objects were others.

    Returns:
        Whether other objects were registered.
    """
    cls, properties = kind
    if type(module) is not cls:
        module.__class__ = cls
    for name in properties.keys() - cls.__dict__.keys():
        setattr(cls, name, properties[name])
    replaced = not all(map(_same, _registered(module), tables))
    if replaced:
        for name, before in zip(TABLES, tables, strict=True):
            present = getattr(module, name)
            present.clear()
            present.update(before)
        _set_contents(module, hooks)
    return replaced


def _has_values(tensor: Tensor) -> bool:
    """Return whether values can be kept: of no lazy, meta or nested tensor, and of no wrapper around tensors."""
    if is_lazy(tensor) or tensor.is_meta or tensor.is_nested:
        return False
    part = local(tensor)
    plain = type(part) in (Tensor, nn.Parameter, nn.Buffer) or not part.numel()
    return plain or storage_of(part) is not None


def _set_version(tensor: Tensor, version: int) -> None:
    torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))


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
