"""The saved form of an average: a flat dict of tensors.

All values are tensors, so that DCP stores no pickles and `torch.load(weights_only=True)` can read them. Keys are the
canonical names of tensors and two reserved keys, `COUNTERS` and `RULE`. Programs that read saved averages may import
the names in `__all__`.
"""

import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ema.config import EMAConfig
from ema.kinds import kind_of
from ema.memory import PLAIN_TENSORS
from ema.names import canonical, own_names
from ema.rules import STEERED
from ema.walk import Walk

__all__ = ["COUNTERS", "RULE", "Counters", "canonical", "own_names", "read_rule"]

COUNTERS = "_ema.counters"
"""int64 [5]: started, num_updates, num_skipped, init_iteration, last_iteration (-1 means none or unknown)."""
RULE = "_ema.rule"
"""uint8 [1024]: JSON of the config's fields that decide the weights, padded with spaces."""
RULE_BYTES = 1024
SINCE_ORIGIN = "since_origin"
"""Further field of a saved rule: false if the average has had another rule, or an unknown one, since its origin."""
RULE_FIELDS = (
    "type",
    *STEERED,
    "batch_size",
    "reference_batch_size",
    "start_iter",
    "update_every",
    "rule",
    "num_iterations",
)
"""Fields of `EMAConfig` that decide the weights: the settings of each rule, and those that all rules share."""
UNKNOWN = -1


@dataclass
class Counters:
    """The state of an average besides its tensors."""

    started: bool = False
    num_updates: int = 0
    num_skipped: int = 0
    init_iteration: int = UNKNOWN
    last_iteration: int = UNKNOWN

    def to_tensor(self) -> Tensor:
        """Return int64 [5] on the CPU."""
        return torch.tensor(
            [self.started, self.num_updates, self.num_skipped, self.init_iteration, self.last_iteration],
            dtype=torch.int64,
            device="cpu",
        )

    @classmethod
    def from_tensor(cls, tensor: Any) -> "Counters":
        """Return the counters from the tensor that `to_tensor` made of them.

        Raises:
            ValueError: The value is not a tensor of five int64 numbers in their ranges.
        """
        if not isinstance(tensor, Tensor) or tensor.dtype is not torch.int64 or tensor.shape != (5,):
            raise ValueError(f"{COUNTERS!r}: expected an int64 tensor of 5 numbers, got {_kind(tensor)}")
        started, *numbers = tensor.tolist()
        if started not in (0, 1) or min(numbers) < UNKNOWN:
            raise ValueError(
                f"{COUNTERS!r}: expected a started flag of 0 or 1 and four counts, got {tensor.tolist()}"
            )
        return cls(bool(started), *numbers)


def rule_tensor(config: EMAConfig, *, since_origin: bool = True) -> Tensor:
    """Return the fields of the rule as uint8 [1024] on the CPU; `since_origin` is stored only if it is false."""
    fields = {name: getattr(config, name) for name in RULE_FIELDS}
    text = json.dumps(fields).encode()
    if not since_origin:
        # Without spaces it is no longer than the text above, which was checked when the average was made.
        text = json.dumps({**fields, SINCE_ORIGIN: False}, separators=(",", ":")).encode()
    if len(text) > RULE_BYTES:
        raise ValueError(
            f"EMAConfig.rule: expected a rule that fits into {RULE_BYTES} bytes of JSON, got {config.rule!r}"
        )
    return torch.tensor(list(text.ljust(RULE_BYTES)), dtype=torch.uint8, device="cpu")


def read_rule(tensor: Any) -> dict[str, Any]:
    """Return the fields of a rule from the tensor that `rule_tensor` made of them.

    Raises:
        ValueError: The tensor does not hold a JSON object.
    """
    if not isinstance(tensor, Tensor) or tensor.dtype is not torch.uint8:
        raise ValueError(f"{RULE!r}: expected a uint8 tensor of JSON, got {_kind(tensor)}")
    try:
        fields = json.loads(bytes(tensor.tolist()).decode())
    except ValueError as error:
        raise ValueError(f"{RULE!r}: expected JSON, got {bytes(tensor.tolist())[:40]!r}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{RULE!r}: expected a JSON object, got {fields!r}")
    return fields


def warn_of_changes(stored: Mapping[str, Any], config: EMAConfig) -> bool:
    """Warn if fields of the rule differ from those in the saved state; one that neither rule reads makes no difference.

    Returns:
        Whether the weights are those of another rule. A user's own rule may read the batch size and the length of the
        run; a difference of these alone gives the warning only.
    """
    now = read_rule(rule_tensor(config))
    changed = [
        name
        for name, value in now.items()
        if name in stored and stored[name] != value and (_reads(stored, name) or _reads(now, name))
    ]
    if changed:
        texts = [f"{name} {stored[name]!r} -> {now[name]!r}" for name in changed]
        warnings.warn(f"the loaded average goes on under another rule: {', '.join(texts)}", stacklevel=4)
    return not set(changed) <= (set() if config.rule is None else {"batch_size", "num_iterations"})


def _reads(fields: Mapping[str, Any], name: str) -> bool:
    """Return whether a rule with these fields reads the field `name`; a user's own rule may read all of them."""
    kind = fields.get("type")
    if fields.get("rule") is not None:
        return True
    if name == "batch_size":
        return kind == "halflife" or fields.get("reference_batch_size") is not None
    if name == "num_iterations":
        return kind == "cosine"
    return name not in STEERED or kind in STEERED[name]


def match(
    state: Mapping[str, Any],
    shadows: Mapping[str, Tensor],
    names: Mapping[str, list[str]],
    copies: Collection[str],
    optional: Collection[str],
    walk: Walk,
) -> dict[str, Tensor]:
    """Find the saved value of each shadow; a tied tensor may be saved under any of its names.

    Args:
        state: what `state_dict` returned, or the plain dict of another implementation, without reserved keys.
        shadows: by slot name.
        names: all names of each slot, by slot name.
        copies: names of copied buffers, which may have any shape.
        optional: those of them that may be None; then the state does not have them.
        walk: the live model. A plain dict may also contain tensors of the model that this average does not track.

    Returns:
        Saved values by slot name.

    Raises:
        KeyError: Keys are missing, unexpected or ambiguous; the message lists them.
        ValueError: A value has the wrong shape or kind; the message has its key.
    """
    slots = {name: [name] for name in copies} | {name: names[name] for name in shadows}
    expected = {name for own in slots.values() for name in own}
    ignored = walk.unpublished | set(walk.by_name) if COUNTERS not in state else set()
    keys = own_names([key for key in state if key not in (COUNTERS, RULE)], expected | ignored)
    given: dict[str, tuple[str, Any]] = {}
    for key, name in keys.items():
        if name in given and given[name][1] is not state[key]:
            raise KeyError(f"the state has two values of {name!r}: keys {given[name][0]!r} and {key!r}")
        given[name] = (key, state[key])
    found: dict[str, Tensor] = {}
    for slot_name, own in slots.items():
        held = [given[name] for name in own if name in given]
        for key, value in held:
            _check_value(key, value, None if slot_name in copies else shadows[slot_name])
            if not _same_values(found.setdefault(slot_name, value), value):
                raise KeyError(
                    f"the state has two values of one tensor: keys {held[0][0]!r} and {key!r} are tied"
                )
    raise_for_names(
        missing=[name for name in shadows if name not in found and name not in optional],
        unexpected=[key for name, (key, _) in given.items() if name not in expected | ignored],
        where="the state",
    )
    return found


def raise_for_names(*, missing: list[str], unexpected: list[str], where: str) -> None:
    """Raise a KeyError with the first five names of each list, unless both lists are empty."""
    parts = []
    if missing:
        parts.append(f"{where} lacks {_some(missing)}")
    if unexpected:
        parts.append(f"{where} has unexpected {_some(unexpected)}")
    if parts:
        raise KeyError("; ".join(parts))


def _check_value(key: str, value: Any, shadow: Tensor | None) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{key!r}: expected a tensor, got {_kind(value)}")
    if value.is_meta:
        raise ValueError(f"{key!r}: expected values, got a meta tensor")
    if value.is_nested:
        raise ValueError(f"{key!r}: expected a plain tensor, got a nested one")
    if shadow is None:
        return
    if value.shape != shadow.shape:
        raise ValueError(f"{key!r}: expected shape {tuple(shadow.shape)}, got {tuple(value.shape)}")
    if kind_of(value) != kind_of(shadow):
        raise ValueError(f"{key!r}: expected a tensor like {shadow.dtype}, got {value.dtype}")
    if value.layout != shadow.layout:
        raise ValueError(f"{key!r}: expected layout {shadow.layout}, got {value.layout}")


def _same_values(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal. Sharded or sparse tensors, or those of two devices, count as equal."""
    if one is other or not {type(one), type(other)} <= PLAIN_TENSORS or one.device != other.device:
        return True
    if (one.shape, one.dtype, one.layout) != (other.shape, other.dtype, other.layout):
        return False
    if one.layout is not torch.strided or torch.equal(one, other):
        return True
    return not one.is_quantized and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(repr(name) for name in names[:5]) + rest
