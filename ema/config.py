"""What an average can be told. Imports nothing but the standard library, so that it answers at once."""

import math
from dataclasses import dataclass, field
from typing import Any

RULES = ("constant", "halflife", "power", "warmup", "debiased", "fraction")
MODES = ("full_tensor", "local_shard")
DTYPES = ("float32", "bfloat16", "float16", "float64")
DEVICES = ("cpu",)
MAX_SIGMA_REL = 1 / math.sqrt(12)
"""Relative width of the power profile at gamma 0 (the plain mean): no power profile is wider."""


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
    """For loops that cannot tell `update(finite=...)`: look at the live weights first (waits for the device)."""
    device: str | None = None
    """Where the shadow is kept: null is with the parameters; `cpu` is pinned host memory, averaged there by a thread of
    its own while the device goes on (costs a host copy of the live weights besides the shadow)."""
    overlap: bool = False
    """On an accelerator: average on a stream of its own during the next forward and backward; the next optimizer step
    waits for it. Without effect where the weights lie on the CPU."""
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
        _require(_is_number(self.decay) and 0 <= self.decay <= 1, "decay", "a number in [0, 1]", self.decay)
        _require(self.type in RULES, "type", f"one of {', '.join(RULES)}", self.type)
        _require(_is_int(self.start_iter, 0), "start_iter", "a whole number of at least 0", self.start_iter)
        _require(_is_number(self.gamma) and self.gamma >= 0, "gamma", "a number of at least 0", self.gamma)
        _require(
            _is_number(self.halflife_kimg) and self.halflife_kimg > 0,
            "halflife_kimg",
            "a number above 0",
            self.halflife_kimg,
        )
        _require(
            self.rampup_ratio is None or (_is_number(self.rampup_ratio) and self.rampup_ratio > 0),
            "rampup_ratio",
            "a number above 0, or None",
            self.rampup_ratio,
        )
        _require(_is_int(self.batch_size, 1), "batch_size", "a whole number of at least 1", self.batch_size)
        _require(self.mode in MODES, "mode", f"one of {', '.join(MODES)}", self.mode)
        _require(
            self.dtype is None or self.dtype in DTYPES,
            "dtype",
            f"one of {', '.join(DTYPES)}, or None",
            self.dtype,
        )
        _require(
            self.device is None or self.device in DEVICES,
            "device",
            f"one of {', '.join(DEVICES)}, or None",
            self.device,
        )
        _require(
            _is_int(self.update_every, 1), "update_every", "a whole number of at least 1", self.update_every
        )
        _require(
            self.sigma_rel is None or (_is_number(self.sigma_rel) and 0 < self.sigma_rel < MAX_SIGMA_REL),
            "sigma_rel",
            f"a number in (0, {MAX_SIGMA_REL:.4f}), or None",
            self.sigma_rel,
        )
        _require(
            self.rule is None or (isinstance(self.rule, str) and bool(self.rule)),
            "rule",
            "a dotted path, or None",
            self.rule,
        )
        _require(
            _is_number(self.halflife_fraction) and self.halflife_fraction > 0,
            "halflife_fraction",
            "a number above 0",
            self.halflife_fraction,
        )
        _require(
            self.reference_batch_size is None or _is_int(self.reference_batch_size, 1),
            "reference_batch_size",
            "a whole number of at least 1, or None",
            self.reference_batch_size,
        )
        for name in ("fsdp2", "track_frozen", "check_finite", "overlap"):
            value = getattr(self, name)
            _require(isinstance(value, bool), name, "True or False", value)
        for name in ("include", "exclude", "average_buffers"):
            value = getattr(self, name)
            _require(
                isinstance(value, list | tuple) and all(isinstance(pattern, str) for pattern in value),
                name,
                "a list of name patterns",
                value,
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _require(good: bool, name: str, expected: str, value: Any) -> None:
    if not good:
        raise ValueError(f"EMAConfig.{name}: expected {expected}, got {value!r}")
