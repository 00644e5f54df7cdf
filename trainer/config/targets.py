"""Build objects from the `_target_` nodes of a configuration, and refuse targets that are not trusted.

A configuration may come from a stranger together with a checkpoint, so it may not name any callable. The rules:

* A target must start with a prefix of its group or of `allow_targets`, or be typed on this command line.
* It must be a class or a function, as `KINDS` lists, that is defined under such a prefix, not only imported there.
* A model may also come from a function or a class method whose whole path was typed (`timm.create_model`), or from
  `peft.get_peft_model`, which only wraps the model that it is given.
* An argument of a model that makes a library run code from elsewhere (`trust_remote_code`) must be typed as well.
* Arguments are checked against the signature before anything is called.
"""

import difflib
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import hydra.utils
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException

from trainer.config.annotations import typed
from trainer.config.on_checkpoint import KEY as COMMAND_KEY
from trainer.config.on_checkpoint import trusting
from trainer.errors import ConfigError, blamed_on, message_of

PREFIXES = {
    "model": ("models.", "torch.nn.", "transformers.", "diffusers.", "timm.", "peft."),
    "task": ("trainer.tasks.",),
    "data": ("trainer.data.", "torchvision.transforms.v2."),
    "sharding": ("trainer.distributed.strategies.",),
    "optimizer": ("torch.optim.", "trainer.optimizers."),
    "schedule": ("trainer.schedules.",),
    "logger": ("trainer.loggers.",),
}
"""Prefixes of a `_target_` that every configuration may use, by group."""
Kinds = Mapping[str, Callable[[Any], bool]]
CLASSES: Kinds = {"a class": inspect.isclass}
FUNCTIONS: Kinds = {"a function": inspect.isfunction}
CALLABLES: Kinds = {**CLASSES, **FUNCTIONS}
FACTORIES: Kinds = {**CALLABLES, "a class method": inspect.ismethod}
KINDS: Mapping[str, Kinds] = {
    "model": CLASSES,
    "task": CLASSES,
    "data": CALLABLES,
    "sharding": FUNCTIONS,
    "optimizer": CALLABLES,
    "schedule": FUNCTIONS,
    "logger": CLASSES,
}
"""Kinds of objects that a target of each group may be."""
WRAPPERS = ("peft.get_peft_model",)
"""Functions that every configuration may call for a model: they load nothing, and add parts to a model."""
RUNS_CODE = ("trust_remote_code", "allow_all_kernels", "megatron_core")
"""Arguments of transformers, diffusers and peft with which they import code of a model's folder or of any module."""
EXTRAS = ("peft",)
"""Packages that an extra of this project installs, of the same name."""
RULE_KEY = re.compile(r"ema\.rule|ema\.averages\.[^.]+\.rule")
"""Pattern of the keys that name a user's own decay rule."""


def instantiate(node: Mapping[str, Any], *, group: str, allowed: Sequence[str], **extra: Any) -> Any:
    """Build the object that a node of the configuration describes.

    Args:
        node: `_target_` and arguments, all resolved; nested nodes with a `_target_` are built first; a
            function in a task is not called, but gets its arguments bound.
        group: key of the node (`model`, `task` or `data`), which selects the default prefixes.
        allowed: further prefixes, from `allow_targets` and `trusted_targets`.
        **extra: arguments that are not in the configuration.

    Raises:
        ConfigError: The target is not allowed or does not exist, an argument is unknown, missing or of a wrong type, or
            the constructor fails; names the key.
    """
    resolve_target(node, group=group, allowed=allowed)
    if group == "model":
        _refuse_code(node, allowed)
    with blamed_on(group):
        checked = _checked(node, group, group, allowed, extra)
        try:
            # _partial_: the constructor is called below, so Hydra neither wraps its errors nor copies `extra`.
            bound = hydra.utils.instantiate(checked, _partial_=True, _convert_="all")
        except InstantiationException as error:
            with blamed_on(_key_of(error, checked, group)):
                raise error.__cause__ or error  # noqa: B904 (the cause may have its own cause)
        built = bound(**extra)
    if group == "model" and not _is_module(type(built)):
        raise ConfigError(
            f"model._target_: expected a torch.nn.Module, {node['_target_']} returned {type(built).__name__}"
        )
    return built


def _key_of(error: InstantiationException, node: Mapping[str, Any], group: str) -> str:
    """Return the key of the nested node that Hydra could not build; the group if it is the node itself."""
    place = re.search(r"full_key: (\S+)", str(error))
    keys = (key.removesuffix("._target_") for key, _ in leaves(group, node) if key.endswith("._target_"))
    # Hydra writes `transforms0` for transforms[0].
    found = (key for key in keys if place and re.sub(r"[][]", "", key) == f"{group}.{place[1]}")
    return next(found, group)


def resolve_target(
    node: Mapping[str, Any], *, group: str, allowed: Sequence[str], key: str | None = None
) -> Any:
    """Return the class or function that the node's `_target_` names; nothing is called.

    `key` is the config key of the node for messages; None means `group`.

    Raises:
        ConfigError: `_target_` is missing, not allowed, does not exist, or is of a kind that `KINDS` does not list.
    """
    target = _resolve_of(group, node, f"{key or group}._target_", allowed)
    if group == "model" and inspect.isclass(target) and not _is_module(target):
        raise ConfigError(
            f"model._target_: expected a subclass of torch.nn.Module, got {target.__qualname__}"
        )
    return target


def load_rule(
    rule: str | Mapping[str, Any], allowed: Sequence[str], key: str = "ema.rule"
) -> Callable[..., float]:
    """Return the user's own decay rule, which is called with the iteration and the settings of the average.

    Args:
        rule: dotted path of the function, or a node with its `_target_` and its further arguments, which are bound.
        allowed: prefixes that the path may start with; there are no built-in ones.
        key: config key that names the rule, for messages.

    Raises:
        ConfigError: The function is not under an allowed prefix, does not exist, or takes other arguments.
    """
    if isinstance(rule, Mapping):
        return _bound(rule, key, allowed, called_with=("t", "config"))
    return _resolve(rule, key, tuple(allowed), FUNCTIONS)


def bind_metric(node: Mapping[str, Any], key: str, allowed: Sequence[str]) -> Callable[..., Any]:
    """Return the metric function of a node, with the other keys of the node bound as arguments.

    The result is called with model, batch and random. No prefix is allowed by default.

    Raises:
        ConfigError: The function is not under an allowed prefix, does not exist, or takes other arguments.
    """
    return _bound(node, key, allowed, called_with=("model", "batch", "random"))


def build_callback(node: Any, key: str, allowed: Sequence[str]) -> Any:
    """Build the object that a node of the group `callbacks` describes. No prefix is allowed by default.

    Raises:
        ConfigError: The target is not under an allowed prefix, does not exist, takes other arguments, or fails.
    """
    if not isinstance(node, Mapping):
        raise ConfigError(f"{key}: expected a mapping with _target_ and arguments, got {node!r}")
    make = _bound(node, key, allowed, called_with=(), kinds=CALLABLES)
    with blamed_on(key):
        return make()


def _bound(
    node: Mapping[str, Any],
    key: str,
    allowed: Sequence[str],
    *,
    called_with: Sequence[str],
    kinds: Kinds = FUNCTIONS,
) -> Callable[..., Any]:
    function = _resolve(node.get("_target_"), f"{key}._target_", tuple(allowed), kinds)
    arguments = {name: value for name, value in node.items() if name != "_target_"}
    return bind(function, arguments, key=key, called_with=called_with)


def bind(
    function: Any, arguments: Mapping[str, Any], *, key: str, called_with: Sequence[str]
) -> Callable[..., Any]:
    """Return the function with `arguments` bound by name, converted to the types of its annotations.

    Args:
        function: function or class.
        arguments: values by argument name.
        key: config key of the arguments, for messages.
        called_with: names of the positional arguments that the result is called with.

    Raises:
        ConfigError: The function takes other arguments or other types; names the key.
    """
    try:
        inspect.signature(function).bind(*called_with, **arguments)
    except TypeError as error:
        raise ConfigError(
            f"{key}: {function.__qualname__} must accept ({', '.join(called_with)}) and these keys: {error}"
        ) from error
    return functools.partial(function, **typed(function, arguments, key))


def trusted_targets(task_overrides: Sequence[str]) -> list[str]:
    """Return what the overrides of this command line allow by typing it: targets, decay rules, a command, and arguments
    in `RUNS_CODE`.

    Raises:
        ConfigError: An override cannot be parsed.
    """
    try:
        overrides = OverridesParser.create().parse_overrides(list(task_overrides))
    except HydraException as error:
        raise ConfigError(message_of(error)) from error
    typed = [
        (key, value)
        for override in overrides
        if not override.is_delete()
        for key, value in leaves(override.key_or_group, override.value())
    ]
    texts = [(key, value) for key, value in typed if isinstance(value, str)]
    targets = [value for key, value in texts if key.endswith("._target_") or RULE_KEY.fullmatch(key)]
    commands = [trusting(value) for key, value in texts if key == COMMAND_KEY]
    arguments = [name for key, _ in typed if (name := key.rpartition(".")[2]) in RUNS_CODE]
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


def _within(dotted: str, prefixes: Sequence[str]) -> bool:
    return any(f"{dotted}.".startswith(f"{prefix.rstrip('.')}.") for prefix in prefixes)


def _resolve(dotted: Any, key: str, prefixes: Sequence[str], kinds: Kinds) -> Any:
    if not isinstance(dotted, str) or not dotted:
        raise ConfigError(f"{key}: expected the dotted path of {' or '.join(kinds)}, got {dotted!r}")
    parts = dotted.split(".")
    if not all(part.isidentifier() and not part.startswith("_") for part in parts):
        raise ConfigError(f"{key}: expected a dotted path of public names, got {dotted!r}")
    if not _within(dotted, prefixes):
        fix = f"'allow_targets=[{parts[0]}.]'" if len(parts) > 1 else "its module in front of the name"
        raise ConfigError(
            f"{key}: {dotted!r} is not under {', '.join(prefixes) or 'any allowed prefix'}; add {fix}"
        )
    target = _locate(parts, key)
    if not any(is_kind(target) for is_kind in kinds.values()):
        callable_if_typed = key.startswith("model") and (
            inspect.isfunction(target) or inspect.ismethod(target)
        )
        fix = f"; 'allow_targets=[{dotted}]' allows the call" if callable_if_typed else ""
        raise ConfigError(
            f"{key}: expected {' or '.join(kinds)}, and {dotted!r} is {type(target).__name__}{fix}"
        )
    full_name = _full_name(target)
    if dotted not in prefixes and not _within(full_name, prefixes):
        raise ConfigError(f"{key}: {dotted!r} is {full_name}, which is not under {', '.join(prefixes)}")
    return target


def _resolve_of(group: str, node: Mapping[str, Any], key: str, allowed: Sequence[str]) -> Any:
    dotted = node.get("_target_")
    factory = group == "model" and dotted in (*WRAPPERS, *allowed)
    return _resolve(dotted, key, (*PREFIXES[group], *allowed), FACTORIES if factory else KINDS[group])


def _full_name(target: Any) -> str:
    """Return the dotted path under which a class or function was defined."""
    return f"{target.__module__}.{target.__qualname__}"


def _is_module(target: Any) -> bool:
    return any(
        _full_name(base).startswith("torch.nn.modules.module.Module")
        for base in getattr(target, "__mro__", ())
    )


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
            near = difflib.get_close_matches(part, [name for name in dir(target) if name[0] != "_"], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{key}: {'.'.join(parts[:position])!r} has no {part!r}{hint}")
        target = getattr(target, part)
    return target


def _checked(
    node: Mapping[str, Any], path: str, group: str, allowed: Sequence[str], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the node with its arguments, nested targets included, checked and converted to the types of signatures."""
    target = _resolve_of(group, node, f"{path}._target_", allowed)
    # The allowed libraries also have classes that open files or start processes; no model needs such an argument.
    harmless = _is_module(target) or target.__name__.endswith("Config")
    harmless = harmless or node["_target_"] in WRAPPERS
    if group == "model" and not (harmless or _within(node["_target_"], allowed)):
        raise ConfigError(
            f"{path}._target_: expected a module or a configuration class, got {node['_target_']!r}"
        )
    arguments = {
        name: _walk(value, f"{path}.{name}", group, allowed)
        for name, value in node.items()
        if name != "_target_"
    }
    private = [name for name in arguments if name.startswith("_")]
    if private:
        raise ConfigError(
            f"{path}.{private[0]}: expected arguments of {target.__qualname__}; only _target_ is special"
        )
    arguments = typed(target, arguments, path)
    _check_names(target, {**arguments, **extra}, path)
    return {"_target_": node["_target_"], **arguments}


def _part_of_task(node: Mapping[str, Any], path: str, allowed: Sequence[str]) -> Any:
    """Return a part of a task that it calls: a function with its arguments bound, or the node of a class to build."""
    target = _resolve(node["_target_"], f"{path}._target_", (*PREFIXES["task"], *allowed), CALLABLES)
    if inspect.isclass(target):
        return _checked(node, path, "task", allowed, {})
    arguments = {
        name: _walk(value, f"{path}.{name}", "task", allowed)
        for name, value in node.items()
        if name != "_target_"
    }
    return bind(target, arguments, key=path, called_with=("images",))


def _refuse_code(node: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Refuse arguments in `RUNS_CODE` that were not typed: a configuration or a folder may come from a stranger."""
    for key, value in leaves("model", node):
        name = key.rpartition(".")[2]
        if name in RUNS_CODE and value and name not in allowed:
            raise ConfigError(
                f"{key}: {value!r} runs code from outside the installed packages; 'allow_targets=[{name}]' allows it"
            )


def _walk(value: Any, path: str, group: str, allowed: Sequence[str]) -> Any:
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"{path}: expected a resolved value, got {value!r}")
    if isinstance(value, Mapping):
        if "_target_" in value:
            return (
                _part_of_task(value, path, allowed)
                if group == "task"
                else _checked(value, path, group, allowed, {})
            )
        return {key: _walk(inner, f"{path}.{key}", group, allowed) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_walk(inner, f"{path}[{index}]", group, allowed) for index, inner in enumerate(value)]
    return value


def _check_names(target: Any, arguments: Mapping[str, Any], path: str) -> None:
    parameters = inspect.signature(target).parameters.values()
    takes = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    unknown = [name for name in arguments if name not in takes]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        near = difflib.get_close_matches(unknown[0], takes, n=1)
        hint = f"did you mean {near[0]}? It" if near else "it"
        takes_what = ", ".join(takes) or "none"
        raise ConfigError(
            f"{path}.{unknown[0]}: {target.__qualname__} takes no such argument; {hint} takes {takes_what}"
        )
    needs = [
        p.name for p in parameters if p.default is p.empty and p.name in takes and p.name not in arguments
    ]
    if needs:
        raise ConfigError(f"{path}.{needs[0]}: {target.__qualname__} needs a value: {path}.{needs[0]}=VALUE")
