"""The settings of one average, and their checks. Imports no torch, so that it loads fast."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ema.rules import MAX_SIGMA_REL, RULES

MODES = ("full_tensor", "local_shard")
DTYPES = ("float32", "bfloat16", "float16", "float64")
DEVICES = ("cpu",)


@dataclass
class EMAConfig:
    """One average: its decay rule, when it starts, what it covers, and where and in which dtype it is kept.

    What each field means is written beneath it in ema/config.py. The first ten are those of the same-named class of
    NVIDIA Model-Optimizer, with its defaults.
    """

    decay: float = 0.9999
    """Decay per iteration of the rules `constant`, `warmup` and `debiased`, in [0, 1]; horizon 1 / (1 - decay)."""
    type: str = "constant"
    """Decay rule: `constant`, `halflife`, `power`, `warmup`, `debiased` or `fraction` (formulas in `ema.rules`)."""
    start_iter: int = 0
    """First iteration the average sees, at least 0: it copies the live weights there; earlier updates do nothing."""
    gamma: float = 16.97
    """Exponent of the power rule, at least 0; 16.97 is a relative width (`sigma_rel`) of 0.05, 6.94 of 0.10."""
    halflife_kimg: float = 500.0
    """Half-life of `type=halflife` in thousands of samples, above 0."""
    rampup_ratio: float | None = 0.05
    """halflife: the half-life is at most this share of the samples seen since the start, above 0; null is no ramp."""
    batch_size: int = 1
    """Samples per iteration over all processes, at least 1; for `halflife` and for `reference_batch_size`."""
    fsdp2: bool = True
    """Whether sharded (FSDP2) parameters are expected; False refuses them. Unsharded models do not care."""
    mode: str = "full_tensor"
    """Sharded models: `full_tensor` keeps the whole average on every rank, `local_shard` each rank's part of it."""
    dtype: str | None = "float32"
    """Dtype of the shadow: `float32`, `bfloat16`, `float16`, `float64` (for decays above 0.99999), or null for each
    parameter's own."""

    update_every: int = 1
    """Iterations per update, at least 1; the decays in between are compounded, so the average stays the same one. Where
    the step of an update was not taken, its iterations are left out altogether."""
    sigma_rel: float | None = None
    """power: width of the profile relative to the training length, in (0, 0.2887); set, it overrides `gamma`."""
    rule: str | None = None
    """Dotted path of a user's own rule `fn(t, config) -> beta`. `ema` takes the callable and never imports by name."""
    include: list[str] = field(default_factory=list)
    """Patterns (fnmatch) over canonical names of the parameters to average; empty is all of them."""
    exclude: list[str] = field(default_factory=list)
    """Patterns of parameters not to average although `include` names them; their live values are published."""
    track_frozen: bool = False
    """Whether parameters that do not require grad are averaged too; otherwise their live values are published."""
    average_buffers: list[str] = field(default_factory=list)
    """Patterns of floating-point buffers to average; all other buffers are copied from the live model."""
    check_finite: bool = False
    """Check the live weights before each update, for loops that cannot pass `finite` (waits for the device)."""
    device: str | None = None
    """Where the shadow is kept: null is with the parameters; `cpu` is pinned host memory, averaged there by a thread of
    its own while the device goes on (costs a host copy of the live weights besides the shadow)."""
    overlap: bool = False
    """On an accelerator: average on a stream of its own during the next forward and backward; the next optimizer step
    waits for it. Without effect for weights on the CPU."""
    halflife_fraction: float = 0.05
    """fraction: half-life as a share of the iterations since the start, above 0. 0.05 is the ramp of `halflife`; it
    looks like `power` with gamma 12.9, and needs no tuning to the length of the run."""
    reference_batch_size: int | None = None
    """Batch size that `decay` was chosen for, at least 1: at `batch_size` B the decay is decay^(B / reference), so that
    the average of a scaled-up run spans the same samples. None takes `decay` as it is."""

    def validate(self) -> None:
        """Check every field.

        Raises:
            ValueError: naming the field, what was expected and the value received.
        """
        for name, (holds, expected) in CHECKS.items():
            value = getattr(self, name)
            if not holds(value):
                raise ValueError(f"EMAConfig.{name}: expected {expected}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_patterns(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(pattern, str) for pattern in value)


Check = tuple[Callable[[Any], bool], str]
"""A condition on a value, and the words for it in a message."""


def _or_none(check: Check) -> Check:
    holds, expected = check
    return lambda value: value is None or holds(value), f"{expected}, or None"


def _one_of(choices: tuple[str, ...]) -> Check:
    return lambda value: value in choices, f"one of {', '.join(choices)}"


_COUNT: Check = (lambda value: _is_int(value, 1), "a whole number of at least 1")
_POSITIVE: Check = (lambda value: _is_number(value) and value > 0, "a number above 0")
_FLAG: Check = (_is_bool, "True or False")
_PATTERNS: Check = (_is_patterns, "a list of name patterns")

CHECKS: dict[str, Check] = {
    "decay": (lambda value: _is_number(value) and 0 <= value <= 1, "a number in [0, 1]"),
    "type": _one_of(tuple(RULES)),
    "start_iter": (lambda value: _is_int(value, 0), "a whole number of at least 0"),
    "gamma": (lambda value: _is_number(value) and value >= 0, "a number of at least 0"),
    "halflife_kimg": _POSITIVE,
    "rampup_ratio": _or_none(_POSITIVE),
    "batch_size": _COUNT,
    "mode": _one_of(MODES),
    "dtype": _or_none(_one_of(DTYPES)),
    "device": _or_none(_one_of(DEVICES)),
    "update_every": _COUNT,
    "sigma_rel": _or_none(
        (
            lambda value: _is_number(value) and 0 < value < MAX_SIGMA_REL,
            f"a number in (0, {MAX_SIGMA_REL:.4f})",
        )
    ),
    "rule": _or_none((lambda value: isinstance(value, str) and bool(value), "a dotted path")),
    "halflife_fraction": _POSITIVE,
    "reference_batch_size": _or_none(_COUNT),
    "fsdp2": _FLAG,
    "track_frozen": _FLAG,
    "check_finite": _FLAG,
    "overlap": _FLAG,
    "include": _PATTERNS,
    "exclude": _PATTERNS,
    "average_buffers": _PATTERNS,
}
"""The check of each field of `EMAConfig`, in the order in which they are made."""
