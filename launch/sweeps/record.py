"""Records in JSON, read as data: a dataclass whose fields have the types that it declares, or a line that says not."""

import types
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Kind = TypeVar("Kind")


def read_record(kind: type[Kind], content: Any, **own: Any) -> Kind:
    """A record of this kind. Keys that it does not know are left out: a later version may have written them.

    Args:
        kind: a dataclass of JSON values.
        content: what was read.
        own: fields that are not read.

    Raises:
        TypeError: naming the field that is missing or of another type.
    """
    if not isinstance(content, Mapping):
        raise TypeError(f"expected keys and values, got {repr(content)[:60]}")
    hints = get_type_hints(kind)
    known = {field.name: content[field.name] for field in fields(kind) if field.name in content}  # type: ignore[arg-type]
    for name, value in known.items():
        if name not in own and not _fits(value, hints[name]):
            raise TypeError(f"{name}: expected {_told(hints[name])}, got {repr(value)[:60]}")
    return kind(**{**known, **own})


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _told(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
