"""Check that a mapping of a configuration has the fields of a dataclass and no others. Imports no torch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from trainer.errors import ConfigError, near


def check_fields(fields: Any, kind: type, key: str, expected: str, otherwise: str = "") -> None:
    """Check a mapping whose keys are fields of a dataclass.

    Args:
        fields: value of the configuration.
        kind: dataclass.
        key: config key of the mapping, for messages.
        expected: description of the mapping, with an example.
        otherwise: advice for an unknown key that is like no field; "" gives none.

    Raises:
        ConfigError: The value is no mapping, or has an unknown key; names it.
    """
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{key}: expected {expected}, got {fields!r}")
    allowed = [field.name for field in dataclasses.fields(kind)]
    for field in fields:
        if field not in allowed:
            hint = near(str(field), allowed, prefix=f"{key}.") or (f"; {otherwise}" if otherwise else "")
            raise ConfigError(f"{key}.{field}: unknown key{hint}")
