"""The settings of one average, and their checks. Does not import torch, so that it loads fast."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ema.rules import MAX_SIGMA_REL, RULES

MODES = ("full_tensor", "local_shard")
DTYPES = ("float32", "bfloat16", "float16", "float64")
DEVICES = ("cpu",)
SHARED_FIELDS = 10
"""Number of fields at the beginning of `EMAConfig` that other implementations have too."""


@dataclass
class EMAConfig:
    """Settings of one average: its decay rule, its start, the tensors that it tracks, its device and its dtype.

    In ema/config.py each field is explained below its definition. The first ten fields and their defaults are those of
    the class of the same name in NVIDIA Model-Optimizer.
    """

    decay: float = 0.9999
    """Decay per iteration of the rules `constant`, `warmup` and `debiased`, in [0, 1]. An average remembers about
    1 / (1 - decay) iterations. For `cosine` the decay at the start, which rises to 1 over the run."""
    type: str = "constant"
    """Decay rule: `constant`, `halflife`, `power`, `warmup`, `debiased`, `fraction` or `cosine` (formulas in
    `ema.rules`)."""
    start_iter: int = 0
    """Iteration at which the average starts as a copy of the live weights, at least 0; earlier updates do nothing."""
    gamma: float = 16.97
    """Exponent of the rule `power`, at least 0; 16.97 is a relative width (`sigma_rel`) of 0.05, 6.94 one of 0.10."""
    halflife_kimg: float = 500.0
    """Half-life of `type=halflife` in thousands of samples, above 0."""
    rampup_ratio: float | None = 0.05
    """For `halflife`: the half-life is at most this fraction of the samples since the start, above 0; null is no
    limit."""
    batch_size: int = 1
    """Samples per iteration of all processes together, at least 1; `halflife` and `reference_batch_size` need it."""
    fsdp2: bool = True
    """Whether parameters may be sharded (FSDP2); False refuses a sharded model."""
    mode: str = "full_tensor"
    """For sharded models: `full_tensor` keeps the whole average on every rank, `local_shard` only the rank's part."""
    dtype: str | None = "float32"
    """Dtype of the shadow: `float32`, `bfloat16`, `float16`, `float64` (for decays above 0.99999), or null for that of
    each parameter."""

    update_every: int = 1
    """Iterations per update, at least 1. The decay of an update is the product of the decays of its iterations. If the
    optimizer skipped the step of an update, all its iterations are left out."""
    sigma_rel: float | None = None
    """For `power`: width of the profile relative to the training length, in (0, 0.2887); it replaces `gamma`."""
    rule: Any = None
    """Dotted path of a user's own rule `fn(t, config) -> beta`, or `{_target_: path, **args}` of one that takes further
    arguments. `ema` does not import it: pass the callable too, with its arguments bound."""
    include: list[str] = field(default_factory=list)
    """Patterns (fnmatch) of canonical names of the parameters to average; empty means all parameters."""
    exclude: list[str] = field(default_factory=list)
    """Patterns of parameters not to average although they match `include`; their live values are published."""
    track_frozen: bool = False
    """Whether parameters that do not require grad are averaged too. If not, their live values are published."""
    average_buffers: list[str] = field(default_factory=list)
    """Patterns of floating-point buffers to average; all other buffers are copied from the live model."""
    check_finite: bool = False
    """Whether each update checks the live tensors that it averages first, for loops that cannot pass `finite`. The host
    waits for it."""
    device: str | None = None
    """Device of the shadow. null is the device of the parameters. `cpu` is pinned host memory, where a thread updates
    the shadow while training continues; this needs host memory for a copy of the live weights too."""
    overlap: bool = False
    """On an accelerator: update on a separate stream during the next forward and backward. The next optimizer step
    waits for the update. No effect for weights on the CPU."""
    halflife_fraction: float = 0.05
    """For `fraction`: half-life as a fraction of the iterations since the start, above 0. 0.05 is about the same as
    `power` with gamma 12.9. It need not be tuned to the length of the run."""
    reference_batch_size: int | None = None
    """Batch size that `decay` was chosen for, at least 1. With `batch_size` B the decay is decay^(B / reference), so
    that the average remembers the same number of samples at every batch size. None uses `decay` as it is."""
    num_iterations: int = 0
    """Iterations of the whole run, at least 0; `cosine` needs it, and a user's own rule may read it."""

    @classmethod
    def of(cls, config: Any) -> "EMAConfig":
        """Return `config` if it is of this class; else these settings from an object of any class with such fields.

        Args:
            config: an object with at least the first ten fields, such as Model-Optimizer's config. Further fields that
                it lacks have their defaults.

        Raises:
            ValueError: It lacks some of the ten.
        """
        if isinstance(config, cls):
            return config
        names = [one.name for one in fields(cls)]
        if missing := [name for name in names[:SHARED_FIELDS] if not hasattr(config, name)]:
            raise ValueError(
                f"config: expected an EMAConfig or an object with its first ten fields, got {type(config).__name__}"
                f" without {', '.join(missing)}"
            )
        return cls(**{name: getattr(config, name) for name in names if hasattr(config, name)})

    def validate(self) -> None:
        """Check every field.

        Raises:
            ValueError: A value is not allowed; the message has the field, the expected and the received value.
        """
        for name, (holds, expected) in CHECKS.items():
            value = getattr(self, name)
            if not holds(value):
                raise ValueError(f"EMAConfig.{name}: expected {expected}, got {value!r}")
        if self.type == "cosine" and self.rule is None and self.num_iterations < 1:
            raise ValueError(
                f"EMAConfig.num_iterations: expected the length of the run for cosine, got {self.num_iterations}"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_patterns(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(pattern, str) for pattern in value)


def _is_rule(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value)
    return isinstance(value, Mapping) and bool(value.get("_target_")) and _is_plain(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, str | int | float | bool | None)


Check = tuple[Callable[[Any], bool], str]
"""A condition on a value, and its description in messages."""


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
    "rule": _or_none((_is_rule, "a dotted path, or {_target_: path, **args} with plain arguments")),
    "num_iterations": (lambda value: _is_int(value, 0), "a whole number of at least 0"),
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
"""The check of each field of `EMAConfig`, in the order of checking."""
