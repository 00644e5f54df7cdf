"""Convert the arguments of a target to the plain types of their annotations. Imports no torch."""

import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf, ValidationError

from trainer.errors import ConfigError


def typed(target: Any, arguments: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Convert arguments of a class or function whose annotation is a plain type; leave all others as they are.

    `path` is the config key of the arguments, for messages.

    Raises:
        ConfigError: An argument has another type than its annotation; names it.
    """
    function = target.__init__ if inspect.isclass(target) else target
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # annotations that exist for type checkers only
        hints = {}
    parameters = inspect.signature(target).parameters
    converted = dict(arguments)
    for name, value in arguments.items():
        if name not in hints or name not in parameters:
            continue
        hint = hints[name]
        if parameters[name].default is None:
            hint = hint | None if isinstance(hint, type | types.UnionType) else typing.Optional[hint]  # noqa: UP045
        if typing.get_origin(hint) is typing.Literal:
            if value not in typing.get_args(hint):
                raise ConfigError(f"{path}.{name}: expected one of {_shown(hint)}, got {value!r}")
        elif _is_plain(hint):
            converted[name] = _convert(hint, value, f"{path}.{name}")
    return converted


def _is_plain(hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not types.NoneType]
        return len(inner) == 1 and len(arguments) == 2 and _is_plain(inner[0])
    return hint in (int, float, bool, str) or (origin is list and _is_plain(arguments[0]))


def _convert(hint: Any, value: Any, path: str) -> Any:
    schema = OmegaConf.structured(dataclasses.make_dataclass("Arguments", [("value", hint)]))
    try:
        return OmegaConf.to_container(OmegaConf.merge(schema, {"value": value}))["value"]  # type: ignore[call-overload, index]
    except ValidationError as error:
        raise ConfigError(f"{path}: expected {_shown(hint)}, got {value!r}") from error


def _shown(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(str(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Union:
        return " or ".join(_shown(argument) for argument in typing.get_args(hint)).replace("NoneType", "null")
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("None", "null")
