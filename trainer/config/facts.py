"""Compare the configuration with the facts of the data, and take sizes of the model from them. Imports no torch."""

import dataclasses
import inspect
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.config.schema import Config
from trainer.config.trust import resolve_target
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.protocols import Splits

SIZES = ("vocab_size", "num_classes")
"""Arguments of a model that may follow from the data: null takes the fact of the same name."""


def unset_sizes(config: Config, allowed: Sequence[str]) -> list[str]:
    """Return the sizes that the configuration leaves to the data: null, which the model's class does not accept.

    Raises:
        ConfigError: The class of the model is not allowed or does not exist.
    """
    unset = [name for name in SIZES if name in config.model and config.model[name] is None]
    if not unset:
        return []
    parameters = inspect.signature(resolve_target(config.model, group="model", allowed=allowed)).parameters
    rest = next((one for one in parameters.values() if one.kind is one.VAR_KEYWORD), None)
    takers = {name: parameters.get(name, rest) for name in unset}
    return [name for name, taker in takers.items() if taker is not None and not _accepts_null(taker)]


def _accepts_null(parameter: inspect.Parameter) -> bool:
    return parameter.default is None or bool(re.search("None|Optional", str(parameter.annotation)))


def sized(config: Config, splits: "Splits", allowed: Sequence[str]) -> tuple[Config, list[str]]:
    """Return the configuration with all sizes of the model, and warnings about sizes that the data only suggests.

    Raises:
        ConfigError: The data does not give a size; names the key.
    """
    sizes, warnings = {}, []
    for name in unset_sizes(config, allowed):
        size = splits.facts.get(name)
        if not isinstance(size, int):
            raise ConfigError(f"model.{name}: expected a number, because the data does not give it")
        sizes[name] = size
        if name in splits.reasons:
            warnings.append(f"model.{name}: {size}, because {splits.reasons[name]}")
    return (dataclasses.replace(config, model=config.model | sizes) if sizes else config), warnings


def check_facts(config: Config, splits: "Splits") -> None:
    """Refuse a model and a data set that disagree on a quantity, such as `vocab_size`, that both have.

    Raises:
        ConfigError: They do, or a split has no samples; names the key.
    """
    for name in SIZES:
        have, need = config.model.get(name), splits.facts.get(name)
        if isinstance(have, int) and isinstance(need, int) and have < need:
            reason = f"because {splits.reasons[name]}" if name in splits.reasons else "as the data has"
            raise ConfigError(f"model.{name}: expected at least {need}, {reason}, got {have}")
    have, need = config.model.get("context"), splits.facts.get("context")
    if isinstance(have, int) and isinstance(need, int) and have < need:
        raise ConfigError(f"data.context: expected at most model.context={have}, got {need}")
    if not len(splits.train) or not len(splits.eval):
        raise ConfigError("data: expected at least one sample in each split")
