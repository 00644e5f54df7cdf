"""Run a model with the weights of an average, inside a training step and without a copy of the weights.

Live storage is not written. A parameter points at the shadow during the call, and at its own memory afterwards. So
tensors that autograd has saved for a backward stay valid. FSDP2 gathers the shadow's shards block by block.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map

from ema import fsdp
from ema.memory import local, own_caches, storage_of, wrapped_like
from ema.names import wrapped
from ema.shards import gather, part_for
from ema.swap import Values, beside
from ema.walk import Walk, in_use

Given = tuple[str, Tensor, Tensor, Tensor]
"""Name of a parameter, the registered tensor, this rank's part of it, and that of its value by the average."""


@torch.no_grad()
def run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    walk: Walk,
    values: Values,
    train: bool,
    average: Any = None,
) -> Any:
    """Return `model(*args, **kwargs)` with other weights and without gradients; the model is afterwards as before.

    Args:
        model: the live model, wrapped or not.
        args: its positional arguments.
        kwargs: its keyword arguments.
        walk: walk over the live tensors of the model, refreshed.
        values: new values by slot name; all other tensors keep theirs, and buffers are copied in any case.
        train: whether the call runs in train mode.
        average: average to which the values belong, for `ema.walk.is_in_use`.

    Collectives and errors as `ExponentialMovingAverage.forward`.
    """
    called, gathered = _without_ddp(model), _managed(walk)
    of_shards: dict[int, Tensor] = {}
    given: list[Given] = []
    for name, tensor, value in _given(walk, values):
        if id(tensor) in gathered:
            of_shards[id(tensor)] = value
        else:
            live = local(tensor)
            part = part_for(tensor, value) if live is not tensor else gather(value)
            given.append((name, tensor, live, part.to(live.device, live.dtype)))
    storages = {storage_of(part) for *_, part in given} - {None}

    def of_shadow(value: object) -> bool:
        return isinstance(value, Tensor) and storage_of(value) in storages

    with ExitStack() as stack:
        stack.enter_context(in_use(average, walk.modules, storages))
        stack.enter_context(_mode(called, train))
        stack.enter_context(own_caches())
        stack.enter_context(_own_attributes(walk))
        stack.enter_context(_other_buffers(walk, values))
        stack.enter_context(_pointing(given))
        if walk.fsdp_modules:
            stack.enter_context(fsdp.gathering(walk.fsdp_modules, of_shards))
        returned = called(*args, **kwargs)
        # A parameter in it would be the live one afterwards, and a view of it would stay one of the shadow.
        if any(of_shadow(one) for one in tree_leaves(returned)):
            returned = tree_map(lambda one: one.clone() if of_shadow(one) else one, returned)
        return returned


def _without_ddp(model: nn.Module) -> nn.Module:
    """Return the module inside of DDP, whose forward without gradients would keep its next one from sharing buffers."""
    called = inner = model
    while (found := wrapped(inner)) is not None:
        if isinstance(inner, DistributedDataParallel):
            called = found[1]
        inner = found[1]
    return called


def run_as_it_is(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, train: bool) -> Any:
    """Return what the model returns with the weights that it has now; arguments as for `run`."""
    return run(model, args, kwargs, walk=Walk(model), values={}, train=train)


def _given(walk: Walk, values: Values) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Iterate over the parameters that the average decides, with name and value; tied ones may be several objects."""
    for name, slot in walk.params.items():
        value = values.get(name)
        if value is not None:
            tensors = {id(owner[key]): owner[key] for owner, key in slot.sites}
            yield from (
                (name, tensor, value) for tensor in tensors.values() if isinstance(tensor, nn.Parameter)
            )


def _managed(walk: Walk) -> set[int]:
    """Return the ids of the sharded parameters that FSDP2 gathers."""
    return {
        id(one.sharded_param)
        for module in walk.fsdp_modules
        for group in module._get_fsdp_state()._fsdp_param_groups
        for one in group.fsdp_params
    }


@contextmanager
def _pointing(given: list[Given]) -> Iterator[None]:
    """Let parameters point at this rank's part of their values inside the context.

    Raises:
        RuntimeError: The forward has written into a parameter, and so into the shadow.
    """
    kept = []
    try:
        for name, tensor, live, part in given:
            # A write into a parameter counts there, and one into a DTensor in its part.
            counted = part if live is not tensor else tensor
            before = None if counted.is_inference() else counted._version
            kept.append((name, tensor, live.detach(), counted, before))
            _point(tensor, part, sharded=live is not tensor)
        yield
        written = [
            name for name, _, _, counted, before in kept if before is not None and counted._version != before
        ]
    finally:
        for _, tensor, memory, counted, _ in kept:
            _point(tensor, memory, sharded=counted is not tensor)
    if written:
        raise RuntimeError(
            f"the forward has written into {written[0]!r}, and so into the average: expected a forward that only"
            " reads its parameters; use copy_to and a second model"
        )


def _point(tensor: Tensor, memory: Tensor, *, sharded: bool) -> None:
    if sharded:
        tensor._local_tensor = memory  # type: ignore[attr-defined]
    else:
        tensor.data = memory


@contextmanager
def _other_buffers(walk: Walk, values: Values) -> Iterator[None]:
    """Register copies of the average's buffers inside the context, and of live ones where it has none."""
    before = [(module._buffers, dict(module._buffers)) for module in walk.modules]
    slots = walk.slots() if any(buffers for _, buffers in before) else ()
    names = {(id(owner), key): slot.name for slot in slots for owner, key in slot.sites}
    names |= {(id(owner), key): name for name, (owner, key) in walk.absent.items()}
    copies: dict[int, Tensor | None] = {}
    try:
        for owner, buffers in before:
            for key, live in buffers.items():
                value = values.get(names.get((id(owner), key), ""), live)
                if live is None:
                    owner[key] = None if value is None else beside(walk, value)
                else:
                    if id(live) not in copies:
                        copies[id(live)] = _copy(live, value)
                    owner[key] = copies[id(live)]
        yield
    finally:
        for owner, buffers in before:
            if [*owner.keys()] == [*buffers]:  # always in a scripted module, which knows no `clear`
                for key, live in buffers.items():
                    owner[key] = live
            else:
                owner.clear()
                owner.update(buffers)


@contextmanager
def _own_attributes(walk: Walk) -> Iterator[None]:
    """Restore plain attributes that belong to a graph of the live model, such as the weight of old `weight_norm`.

    Others stay as the forward left them: a cache and the number that says whether it is valid belong together.
    """
    before = [
        (module.__dict__, key, value)
        for module in walk.modules
        for key, value in module.__dict__.items()
        if isinstance(value, Tensor) and value.grad_fn is not None
    ]
    try:
        yield
    finally:
        for attributes, key, value in before:
            attributes[key] = value


def _copy(live: Tensor, value: Tensor | None) -> Tensor | None:
    """Return a copy of a buffer's value, in the buffer's dtype where both are floating-point."""
    if value is None:
        return None
    part = part_for(live, value).detach()
    floats = live.is_floating_point() and part.is_floating_point()
    dtype = live.dtype if floats else part.dtype
    return wrapped_like(live, part.to(local(live).device, dtype, copy=True))


@contextmanager
def _mode(model: nn.Module, train: bool) -> Iterator[None]:
    """Set the mode of the model inside the context, and restore that of each module."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        if not train:
            for module, _ in modes:
                module.training = False  # its own `train` may merge weights, and so write into the live ones
        elif not all(training for _, training in modes):
            model.train()
        yield
    finally:
        for module, training in modes:
            if module.training is not training:
                module.training = training
