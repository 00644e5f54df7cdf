"""Names of a model's tensors without the components that wrappers add.

A parameter must have the same name with and without `torch.compile`, activation checkpointing and DDP. In a model, the
type of a module shows whether it is a wrapper, so a submodule of the user may be called `module`. In the keys of a
saved state there is only text.
"""

import sys
from collections.abc import Collection, Iterable, Iterator

from torch import nn

WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
    ("torch.nn.parallel", "DataParallel", "module"),
    ("torch.nn.parallel", "DistributedDataParallel", "module"),
    ("deepspeed", "DeepSpeedEngine", "module"),
)
"""Python module, class, and the name of the wrapped module in it. A class that is not imported has no instances."""
COMPONENTS = frozenset(component for *_, component in WRAPPERS)


def canonical(name: str) -> str:
    """Return `name` without components of wrappers, by text: `module._orig_mod.head.weight` becomes `head.weight`."""
    *path, last = name.split(".")
    return ".".join([part for part in path if part not in COMPONENTS] + [last])


def wrapped(module: nn.Module) -> tuple[str, nn.Module] | None:
    """Return the component and the module inside of a wrapper, None for any other module."""
    for home, name, component in WRAPPERS:
        wrapper = getattr(sys.modules.get(home), name, None)
        if wrapper is not None and isinstance(module, wrapper) and component in module._modules:
            return component, module._modules[component]
    return None


def named_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Iterate over all modules with their paths, without wrapper components; a shared module has several paths."""
    yield path, module
    inner = wrapped(module)
    for key, child in module._modules.items():
        if child is not None:
            same = inner is not None and key == inner[0]
            yield from named_modules(child, path if same else f"{path}.{key}" if path else key)


def own_names(keys: Iterable[str], names: Collection[str]) -> dict[str, str]:
    """Find the name of the model that each key of a state means.

    Keys may have components of wrappers that the model does not have. They may lack a component of the model that has
    the name of a wrapper's, because earlier versions removed it.

    Args:
        keys: of the state.
        names: of the model's tensors.

    Returns:
        Names by key. A key that means no tensor of the model has its canonical name.
    """
    keys = list(keys)
    start = _length_of_outer_wrappers(keys, names)
    by_text: dict[str, list[str]] = {}
    for name in names:
        by_text.setdefault(canonical(name), []).append(name)
    found = {}
    for key in keys:
        rest = key[start:]
        candidates = [rest] if rest in names else by_text.get(canonical(key), [])
        inner = sorted((name for name in candidates if f".{rest}".endswith(f".{name}")), key=len)
        found[key] = (inner or (candidates if len(candidates) == 1 else [canonical(key)]))[-1]
    return found


def _length_of_outer_wrappers(keys: list[str], names: Collection[str]) -> int:
    start = 0
    while not all(key[start:] in names for key in keys):
        heads = {key[start:].partition(".")[0] for key in keys}
        head = heads.pop()
        if heads or head not in COMPONENTS:
            break
        start += len(head) + 1
    return start
