"""Choose which tensors of a model are averaged, which are copied, and which are not tracked."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from ema.config import EMAConfig
from ema.state import COUNTERS, RULE
from ema.walk import Slot, Walk


@dataclass(frozen=True)
class Coverage:
    """Names of slots by what happens to them; all other parameters are published with their live values."""

    averaged: tuple[str, ...]
    """Floating-point (or complex) parameters."""
    averaged_buffers: tuple[str, ...]
    """Floating-point buffers that match `average_buffers`."""
    copied: tuple[str, ...]
    """Integer parameters: each update copies them."""
    copied_buffers: tuple[str, ...]
    """All other buffers, also those that are None: each update copies them, in their present shape and dtype."""
    frozen: tuple[str, ...]
    """Parameters that are not tracked because they do not require grad."""


def cover(walk: Walk, config: EMAConfig) -> Coverage:
    """Choose tensors by the config's `include`, `exclude`, `track_frozen` and `average_buffers`.

    Raises:
        ValueError: A pattern matches no name, nothing is left to average, or a tensor has a reserved name.
    """
    _check_patterns("include", config.include, list(walk.params.values()))
    _check_patterns("exclude", config.exclude, list(walk.params.values()))
    _check_patterns("average_buffers", config.average_buffers, list(walk.buffers.values()))
    chosen = [slot for slot in walk.params.values() if _chosen(slot, config)]
    frozen = [slot for slot in chosen if not slot.tensor.requires_grad and not config.track_frozen]
    tracked = [slot for slot in chosen if slot.tensor.requires_grad or config.track_frozen]
    if not tracked:
        raise ValueError(
            "ExponentialMovingAverage: the model has no parameter to average (include, exclude, frozen?)"
        )
    averaged_buffers = {
        name: None
        for name, slot in walk.buffers.items()
        if _has_mean(slot) and _matches(slot.names, config.average_buffers)
    }
    coverage = Coverage(
        averaged=tuple(slot.name for slot in tracked if _has_mean(slot)),
        averaged_buffers=tuple(averaged_buffers),
        copied=tuple(slot.name for slot in tracked if not _has_mean(slot)),
        copied_buffers=(
            *(name for name in walk.buffers if name not in averaged_buffers),
            *(name for name in walk.absent if not _matches([name], config.average_buffers)),
        ),
        frozen=tuple(slot.name for slot in frozen),
    )
    saved = (*coverage.averaged, *averaged_buffers, *coverage.copied, *coverage.copied_buffers)
    if reserved := [name for name in saved if name in (COUNTERS, RULE)]:
        raise ValueError(
            f"{reserved[0]!r}: the saved form of an average reserves this name; rename the tensor"
        )
    return coverage


def _chosen(slot: Slot, config: EMAConfig) -> bool:
    return (not config.include or _matches(slot.names, config.include)) and not _matches(
        slot.names, config.exclude
    )


def _has_mean(slot: Slot) -> bool:
    return slot.tensor.is_floating_point() or slot.tensor.is_complex()


def _matches(names: list[str], patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _check_patterns(field: str, patterns: list[str], slots: list[Slot]) -> None:
    for pattern in patterns:
        if not any(_matches(slot.names, [pattern]) for slot in slots):
            names = [slot.name for slot in slots[:5]]
            raise ValueError(
                f"EMAConfig.{field}: pattern {pattern!r} matches no name of the model, such as {names}"
            )
