"""Decide which classes and functions a configuration may name, and import them.

A configuration may come from a stranger together with a checkpoint, so it may not name any callable. The rules:

* A target must start with a prefix of its group or of `allow_targets`, or be typed on this command line.
* It must be a class or a function, as `TARGETS` lists, that is defined under such a prefix, not only imported there.
* A model may also come from a function or a class method whose whole path was typed (`timm.create_model`), or from
  `peft.get_peft_model`, which only wraps the model that it is given.
* An argument of a model that makes a library run code from elsewhere (`trust_remote_code`) must be typed as well.
"""

import importlib
import inspect
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from trainer.config.on_checkpoint import KEY as COMMAND_KEY
from trainer.config.on_checkpoint import trusting
from trainer.errors import ConfigError, blamed_on, near, shown_key

Kinds = Mapping[str, Callable[[Any], bool]]
CLASSES: Kinds = {"a class": inspect.isclass}
FUNCTIONS: Kinds = {"a function": inspect.isfunction}
CALLABLES: Kinds = {**CLASSES, **FUNCTIONS}
FACTORIES: Kinds = {**CALLABLES, "a class method": inspect.ismethod}
TARGETS: Mapping[str, tuple[Sequence[str], Kinds]] = {
    "model": (("models.", "torch.nn.", "transformers.", "diffusers.", "timm.", "peft."), CLASSES),
    "task": (("trainer.tasks.",), CLASSES),
    "data": (("trainer.data.", "torchvision.transforms.v2."), CALLABLES),
    "sharding": (("trainer.distributed.strategies.",), FUNCTIONS),
    "optimizer": (("torch.optim.", "trainer.optimizers."), CALLABLES),
    "schedule": (("trainer.schedules.",), FUNCTIONS),
    "logger": (("trainer.loggers.",), CLASSES),
}
"""For each group, prefixes of a `_target_` that every configuration may use, and kinds of objects that it may be."""
WRAPPERS = ("peft.get_peft_model",)
"""Functions that every configuration may call for a model: they load nothing, and add parts to a model."""
RUNS_CODE: Mapping[str, Callable[[Any], bool]] = {
    "trust_remote_code": bool,
    "allow_all_kernels": bool,
    "megatron_core": bool,
    "weights_only": operator.not_,
}
"""Arguments of transformers, diffusers and peft with which they run code of a model's folder or of any module, and the
values that do so. Without `weights_only` a file of torch.save is unpickled."""
EXTRAS = ("peft",)
"""Packages that an extra of this project installs, of the same name."""
RULE_KEY = re.compile(r"ema\.rule|ema\.averages\..+\.rule")
"""Pattern of the keys that name a user's own decay rule."""


def trusted_targets(task_overrides: Sequence[str]) -> list[str]:
    """Return what the overrides of this command line allow by typing it: targets, decay rules, a command, and arguments
    in `RUNS_CODE`.

    Raises:
        ConfigError: An override cannot be parsed.
    """
    # Imported here because it imports Hydra, without which `launch.compare` answers sooner.
    from trainer.config.compose import parse_overrides

    typed = [
        (key, value)
        for override in parse_overrides(task_overrides)
        if not override.is_delete()
        for key, value in leaves(override.key_or_group, override.value())
    ]
    texts = [(key, value) for key, value in typed if isinstance(value, str)]
    targets = [
        value
        for key, value in texts
        if key.endswith("._target_")
        or RULE_KEY.fullmatch(key)
        or (key.startswith("logger.also") and "." in value)  # others are built-in names
    ]
    commands = [trusting(value) for key, value in texts if key == COMMAND_KEY]
    arguments = [
        name
        for key, value in typed
        if (name := key.rpartition(".")[2]) in RUNS_CODE and RUNS_CODE[name](value)
    ]
    return [*targets, *commands, *arguments]


def leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield each value below a key with its full key, such as `model.layers[0].width`."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(f"{key}.{name}", inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(f"{key}[{index}]", inner)
    else:
        yield key, value


def resolve_target(
    node: Mapping[str, Any], *, group: str, allowed: Sequence[str], key: str | None = None
) -> Any:
    """Return the class or function that the node's `_target_` names; nothing is called.

    `key` is the config key of the node for messages; None means `group`.

    Raises:
        ConfigError: `_target_` is missing, not allowed, does not exist, or is of a kind that `TARGETS` does not list.
    """
    target = resolve_of(group, node, f"{key or group}._target_", allowed)
    if group == "model" and inspect.isclass(target) and not is_module(target):
        raise ConfigError(
            f"model._target_: expected a subclass of torch.nn.Module, got {target.__qualname__}"
        )
    return target


def resolve_of(group: str, node: Mapping[str, Any], key: str, allowed: Sequence[str]) -> Any:
    """Return the class or function of a node of a group; `key` names it in messages."""
    dotted = node.get("_target_")
    factory = group == "model" and dotted in (*WRAPPERS, *allowed)
    prefixes, kinds = TARGETS[group]
    return resolve(dotted, key, (*prefixes, *allowed), FACTORIES if factory else kinds)


def resolve(dotted: Any, key: str, prefixes: Sequence[str], kinds: Kinds) -> Any:
    """Import the class or function at a dotted path that has one of the prefixes, if it is of one of the kinds.

    `key` is the config key that has the path, for messages.

    Raises:
        ConfigError: It is not allowed, does not exist, or is of another kind; names the key.
    """
    makes_model = key.startswith("model")
    key = shown_key(key)
    if not isinstance(dotted, str) or not dotted:
        raise ConfigError(f"{key}: expected the dotted path of {' or '.join(kinds)}, got {dotted!r}")
    parts = dotted.split(".")
    if not all(part.isidentifier() and not part.startswith("_") for part in parts):
        raise ConfigError(f"{key}: expected a dotted path of public names, got {dotted!r}")
    if not is_within(dotted, prefixes):
        fix = f"'allow_targets=[{parts[0]}.]'" if len(parts) > 1 else "its module in front of the name"
        raise ConfigError(
            f"{key}: {dotted!r} is not under {', '.join(prefixes) or 'any allowed prefix'}; add {fix}"
        )
    target = _locate(parts, key)
    if not any(is_kind(target) for is_kind in kinds.values()):
        callable_if_typed = makes_model and (inspect.isfunction(target) or inspect.ismethod(target))
        fix = f"; 'allow_targets=[{dotted}]' allows the call" if callable_if_typed else ""
        raise ConfigError(
            f"{key}: expected {' or '.join(kinds)}, and {dotted!r} is {type(target).__name__}{fix}"
        )
    full_name = _full_name(target)
    if dotted not in prefixes and not is_within(full_name, prefixes):
        raise ConfigError(f"{key}: {dotted!r} is {full_name}, which is not under {', '.join(prefixes)}")
    return target


def is_within(dotted: str, prefixes: Sequence[str]) -> bool:
    """Return whether a dotted path is one of the prefixes or below one."""
    return any(f"{dotted}.".startswith(f"{prefix.rstrip('.')}.") for prefix in prefixes)


def _locate(parts: Sequence[str], key: str) -> Any:
    """Return the object at a dotted path: import the longest module possible, then follow attributes."""
    dotted = ".".join(parts)
    target: Any = None
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        try:
            target = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise ConfigError(
                    f"{key}: {dotted!r} needs the module {error.name!r}, which is not installed"
                ) from error
            break
        except Exception as error:
            with blamed_on(f"{key}: importing {name}"):
                raise error
    else:
        return target
    if target is None and parts[0] in EXTRAS:
        raise ConfigError(
            f"{key}: {dotted} needs the package {parts[0]}: pip install -c constraints.txt -e '.[{parts[0]}]'"
        )
    if target is None:
        raise ConfigError(
            f"{key}: there is no module {parts[0]!r} (installed, or in this folder), got {dotted!r}"
        )
    for position, part in enumerate(parts[count - 1 :], start=count - 1):
        if not hasattr(target, part):
            hint = near(part, [name for name in dir(target) if name[0] != "_"])
            raise ConfigError(f"{key}: {'.'.join(parts[:position])!r} has no {part!r}{hint}")
        target = getattr(target, part)
    return target


def _full_name(target: Any) -> str:
    """Return the dotted path under which a class or function was defined."""
    return f"{target.__module__}.{target.__qualname__}"


def is_module(target: Any) -> bool:
    """Return whether a class is a torch.nn.Module; does not import torch."""
    return any(
        _full_name(base).startswith("torch.nn.modules.module.Module")
        for base in getattr(target, "__mro__", ())
    )


def refuse_code(node: Any, allowed: Sequence[str], path: str = "model") -> None:
    """Refuse arguments in `RUNS_CODE` that were not typed: a configuration or a folder may come from a stranger."""
    if isinstance(node, list | tuple):
        for index, inner in enumerate(node):
            refuse_code(inner, allowed, f"{path}[{index}]")
    elif isinstance(node, Mapping):
        for name, value in node.items():
            if name in RUNS_CODE and RUNS_CODE[name](value) and name not in allowed:
                raise ConfigError(
                    f"{shown_key(f'{path}.{name}')}: {value!r} runs code from outside the installed packages;"
                    f" 'allow_targets=[{name}]' allows it"
                )
            refuse_code(value, allowed, f"{path}.{name}")
