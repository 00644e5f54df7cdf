"""Build objects from the `_target_` nodes of a configuration; `trainer.config.trust` decides which targets it may name.

Arguments are checked against the signature before anything is called.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import hydra.utils
from hydra.errors import InstantiationException

from trainer.config.annotations import typed
from trainer.config.trust import (
    CALLABLES,
    FUNCTIONS,
    TARGETS,
    WRAPPERS,
    Kinds,
    is_module,
    is_within,
    leaves,
    refuse_code,
    resolve,
    resolve_of,
    resolve_target,
)
from trainer.errors import ConfigError, blamed_on, near


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
        refuse_code(node, allowed)
    with blamed_on(group):
        checked = _checked(node, group, group, allowed, extra)
        try:
            # _partial_: the constructor is called below, so Hydra neither wraps its errors nor copies `extra`.
            bound = hydra.utils.instantiate(checked, _partial_=True, _convert_="all")
        except InstantiationException as error:
            with blamed_on(_key_of(error, checked, group)):
                raise error.__cause__ or error  # noqa: B904 (the cause may have its own cause)
        built = bound(**extra)
    if group == "model" and not is_module(type(built)):
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
    return resolve(rule, key, tuple(allowed), FUNCTIONS)


def bind_metric(
    node: Mapping[str, Any], key: str, allowed: Sequence[str], also: Sequence[str] = ()
) -> Callable[..., Any]:
    """Return the metric function of a node, with the other keys of the node bound as arguments.

    The result is called with model, batch and random. No prefix is allowed by default. `also` are further keys that the
    node may have had, for messages.

    Raises:
        ConfigError: The function is not under an allowed prefix, does not exist, or takes other arguments.
    """
    return _bound(node, key, allowed, called_with=("model", "batch", "random"), also=also)


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
    also: Sequence[str] = (),
) -> Callable[..., Any]:
    function = resolve(node.get("_target_"), f"{key}._target_", tuple(allowed), kinds)
    return bind(function, _arguments(node), key=key, called_with=called_with, also=also)


def _arguments(node: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in node.items() if name != "_target_"}


def bind(
    function: Any,
    arguments: Mapping[str, Any],
    *,
    key: str,
    called_with: Sequence[str],
    also: Sequence[str] = (),
) -> Callable[..., Any]:
    """Return the function or class with `arguments` bound by name, converted to the types of its annotations.

    `called_with` names the positional arguments that the result is called with; `key` is the config key of `arguments`,
    beside which the keys `also` may stand.

    Raises:
        ConfigError: The function takes other arguments or other types; names the key.
    """
    signature = inspect.signature(function)
    try:
        signature.bind(*called_with, **arguments)
    except TypeError as error:
        takes = [*list(signature.parameters)[len(called_with) :], *also]
        hints = (near(name, takes, prefix=f"{key}.") for name in arguments if name not in takes)
        raise ConfigError(
            f"{key}: {function.__qualname__} must accept ({', '.join(called_with)}) and these keys:"
            f" {error}{next(hints, '')}"
        ) from error
    return functools.partial(function, **typed(function, arguments, key))


def _checked(
    node: Mapping[str, Any], path: str, group: str, allowed: Sequence[str], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the node with its arguments, nested targets included, checked and converted to the types of signatures."""
    target = resolve_of(group, node, f"{path}._target_", allowed)
    # The allowed libraries also have classes that open files or start processes; no model needs such an argument.
    harmless = is_module(target) or target.__name__.endswith("Config")
    harmless = harmless or node["_target_"] in WRAPPERS
    if group == "model" and not (harmless or is_within(node["_target_"], allowed)):
        raise ConfigError(
            f"{path}._target_: expected a module or a configuration class, got {node['_target_']!r}"
        )
    arguments = _walk(_arguments(node), path, group, allowed)
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
    prefixes, _ = TARGETS["task"]
    target = resolve(node["_target_"], f"{path}._target_", (*prefixes, *allowed), CALLABLES)
    if inspect.isclass(target):
        return _checked(node, path, "task", allowed, {})
    arguments = _walk(_arguments(node), path, "task", allowed)
    return bind(target, arguments, key=path, called_with=("images",))


def _walk(value: Any, path: str, group: str, allowed: Sequence[str]) -> Any:
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"{path}: expected a resolved value, got {value!r}")
    if isinstance(value, Mapping):
        if "_target_" in value:
            if group == "task":
                return _part_of_task(value, path, allowed)
            return _checked(value, path, group, allowed, {})
        return {key: _walk(inner, f"{path}.{key}", group, allowed) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_walk(inner, f"{path}[{index}]", group, allowed) for index, inner in enumerate(value)]
    return value


def no_such_argument(key: str, name: str, takes: Sequence[str]) -> str:
    """Return the message for a key that is no argument of the class or function `name`, with those that it takes.

    A key that is like none of them may come from an experiment or another file, so the message says how to remove it;
    but not for an entry of a list, which Hydra cannot remove, nor where the value may come from another key: in the
    data of further evaluation sets and in groups of parameters.
    """
    hint = near(key.rpartition(".")[2], takes)  # was typed
    is_own = "[" not in key and not key.startswith(("data.", "optimizer.groups."))
    without = f"; '~{key}' removes it if a file sets it" if is_own and not hint else ""
    it = f"{hint} It" if hint else "; it"
    return f"{key}: {name} takes no such argument{it} takes {', '.join(takes) or 'none'}{without}"


def _check_names(target: Any, arguments: Mapping[str, Any], path: str) -> None:
    parameters = inspect.signature(target).parameters.values()
    takes = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    unknown = [name for name in arguments if name not in takes]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ConfigError(no_such_argument(f"{path}.{unknown[0]}", target.__qualname__, takes))
    needs = [
        p.name for p in parameters if p.default is p.empty and p.name in takes and p.name not in arguments
    ]
    if needs:
        raise ConfigError(f"{path}.{needs[0]}: {target.__qualname__} needs a value: {path}.{needs[0]}=VALUE")
