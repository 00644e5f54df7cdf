"""Reading of JSON records into dataclasses, with a check of the type of every field."""

import types
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Kind = TypeVar("Kind")


def read_record(kind: type[Kind], content: Any, **own: Any) -> Kind:
    """Build a dataclass whose fields have JSON types from parsed JSON; the values in `own` are not taken from it.

    Keys without a field are ignored, because they may come from a later version of the project.

    Raises:
        TypeError: A field is missing or has another type; the message names it.
    """
    if not isinstance(content, Mapping):
        raise TypeError(f"expected keys and values, got {repr(content)[:60]}")
    hints = get_type_hints(kind)
    values = {field.name: content[field.name] for field in fields(kind) if field.name in content}  # type: ignore[arg-type]
    for name, value in values.items():
        if name not in own and not _fits(value, hints[name]):
            hint = hints[name]
            expected = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
            raise TypeError(f"{name}: expected {expected}, got {repr(value)[:60]}")
    return kind(**{**values, **own})


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)
