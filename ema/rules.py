"""Decay rules of `shadow <- beta * shadow + (1 - beta) * live`, and the weight of each iteration.

Each rule is a pure function of the config and of `t`: the iterations since the start of the average, 1, 2, ... It
returns the **gain** `1 - beta` and not beta, because a float near 1 keeps few digits of `1 - beta`. A user's own rule
returns beta: `fn(t, config, **args) -> beta`, where `config.num_iterations` is the length of the run. Nothing here
imports torch.

| type     | 1 - beta                                | weight of theta_s after t iterations (s >= 1)      |
|----------|-----------------------------------------|----------------------------------------------------|
| constant | 1 - b                                   | (1 - b) b^(t-s); theta_0 keeps b^t                  |
| halflife | 1 - 2^(-B / min(h, ramp * seen))        | halves every h samples, for any batch size B        |
| power    | 1 - (1 - 1/t)^(gamma+1)                 | (s/t)^(gamma+1) - ((s-1)/t)^(gamma+1)               |
| warmup   | max(1 - b, 9 / (10 + t))                | power with gamma 8 until t = (10b-1)/(1-b)         |
| debiased | (1 - b) / (1 - b^t)                     | (1 - b) b^(t-s) / (1 - b^t); theta_0 keeps nothing  |
| fraction | 1 - 2^(-1/(f t))                        | (1 - 2^(-1/(f s))) 2^(-(H_t - H_s)/f)               |
| cosine   | (1 - b) (1 + cos(pi t/T)) / 2           | gain_s times the product of the decays after s      |

b is `decay`, or `decay^(batch_size / reference_batch_size)` if `reference_batch_size` is given: one iteration counts as
batch_size / reference_batch_size iterations of the batch size that the decay was chosen for (Busbridge et al., "How to
Scale Your EMA", 2023, arXiv:2307.13813). For `cosine` b is `decay`, and each decay of the schedule gets this exponent.

f is `halflife_fraction`, and H_t = 1 + 1/2 + ... + 1/t. The product of the decays of `fraction` from s to t is
2^(-(H_t - H_s)/f), about (s/t)^(ln 2 / f). So for large t it is the power rule with gamma + 1 = ln 2 / f. theta_0 keeps
2^(-H_t/f).

T is the number of iterations from the start to the end of the run, `num_iterations - start_iter`. Afterwards
the decay is 1. `cosine` is the momentum of the teachers of BYOL (Grill et al., 2020,
arXiv:2006.07733) and DINO (Caron et al., 2021, arXiv:2104.14294).

theta_0 is what the average absorbs first, its **origin**. `profile` takes that as iteration `start_iter`. A loop that
calls the first update after its first step, at iteration 1, gets the weights of the rule one iteration later. To have
theta_0 as origin, call `update(model, iteration=0)` before the first step, as the trainer does
(`trainer.loop.fit.absorb_first_weights`). Saved averages hold their origin; `ema.posthoc.saved_snapshot` reads it.

The power rule is that of Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models"
(2024); debiasing is Adam's (Kingma and Ba, 2015).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ema.config import EMAConfig

MAX_SIGMA_REL = 1 / math.sqrt(12)
"""Relative width of the power profile at gamma 0 (the plain mean); other power profiles are narrower."""
Rule = Callable[[int, "EMAConfig"], float]
"""A user's own decay rule, its arguments bound: `(t, config) -> beta` with t = 1, 2, ... and beta in [0, 1]."""
RULES: dict[str, Rule] = {}
"""Gain of each `EMAConfig.type`; `built_in` adds one."""
STEERED: dict[str, tuple[str, ...]] = {}
"""By field of `EMAConfig`: the names of the rules that read it. Fields that all rules share are not in it."""


def built_in(*fields: str) -> Callable[[Rule], Rule]:
    """Register a function as a built-in rule; its name is the value of `EMAConfig.type`.

    A new rule is a function here and a file in conf/ema. A setting of its own is a field of `EMAConfig`, with its check
    in the same file. Saved averages, default names and error messages follow from `fields`.

    Args:
        fields: the fields of `EMAConfig` that the rule reads, without those that all rules share.
    """

    def register(rule: Rule) -> Rule:
        name = rule.__name__
        RULES[name] = rule
        for field in fields:
            STEERED[field] = (*STEERED.get(field, ()), name)
        return rule

    return register


def settings_of(name: str) -> list[str]:
    """Return the settings of the built-in rule of this name: fields of `EMAConfig`."""
    return [field for field, names in STEERED.items() if name in names]


@built_in("decay")
def constant(t: int, config: EMAConfig) -> float:
    """Use the same decay in every iteration."""
    return _decay_gain(config)


@built_in("halflife_kimg", "rampup_ratio")
def halflife(t: int, config: EMAConfig) -> float:
    """Halve the weight of the past every `halflife_kimg` thousand samples; more often at first with `rampup_ratio`."""
    life = config.halflife_kimg * 1000 / config.batch_size
    if config.rampup_ratio is not None:
        life = min(life, config.rampup_ratio * t)
    return -math.expm1(-math.log(2) / life)


@built_in("gamma", "sigma_rel")
def power(t: int, config: EMAConfig) -> float:
    """Give past iterations a profile of fixed shape, whose width grows with the training (EDM2)."""
    if t == 1:
        return 1.0
    return -math.expm1((power_exponent(config) + 1) * math.log1p(-1 / t))


@built_in("decay")
def warmup(t: int, config: EMAConfig) -> float:
    """Use beta = min(decay, (1 + t) / (10 + t)), the warm-up of TensorFlow."""
    return max(_decay_gain(config), 9 / (10 + t))


@built_in("decay")
def debiased(t: int, config: EMAConfig) -> float:
    """Use a constant decay without any weight for the start: the other weights are divided by their sum."""
    if config.decay in (0, 1):
        # The limits of the formula: decay 0 keeps the newest weights only, decay 1 is the plain mean.
        return 1.0 if config.decay == 0 else 1 / t
    log_decay = batches_of(config) * math.log(config.decay)
    return min(1.0, _decay_gain(config) / -math.expm1(t * log_decay))


@built_in("halflife_fraction")
def fraction(t: int, config: EMAConfig) -> float:
    """Use a half-life that is always the same fraction of the iterations so far."""
    return -math.expm1(-math.log(2) / (config.halflife_fraction * t))


@built_in("decay")
def cosine(t: int, config: EMAConfig) -> float:
    """Let the decay rise to 1 over the run, along a cosine (BYOL, DINO)."""
    length = config.num_iterations - config.start_iter
    share = (1 - config.decay) * (math.cos(math.pi * t / length) + 1) / 2 if t < length else 0.0
    batches = batches_of(config)
    return share if batches == 1 or share in (0, 1) else -math.expm1(batches * math.log1p(-share))


def batches_of(config: EMAConfig) -> float:
    """Return how many iterations of the reference batch size one iteration counts as."""
    return 1.0 if config.reference_batch_size is None else config.batch_size / config.reference_batch_size


def _decay_gain(config: EMAConfig) -> float:
    if config.reference_batch_size in (None, config.batch_size) or config.decay in (0, 1):
        return 1 - config.decay
    return -math.expm1(batches_of(config) * math.log(config.decay))


def path_of(rule: str | Mapping[str, Any]) -> str:
    """Return the dotted path in a value of `EMAConfig.rule`."""
    return str(rule.get("_target_") if isinstance(rule, Mapping) else rule)


def gain(config: EMAConfig, t: int, rule: Rule | None = None) -> float:
    """Return the share of the live weights, 1 - beta, in the update at iteration `t` since the start.

    With `update_every = k` beta is the product of the decays of the k iterations t-k+1 ... t: b^k for constant,
    (1 - k/t)^(gamma+1) for power. So an average with fewer updates remembers as many iterations.

    Args:
        config: settings of the average.
        t: iterations since the start, at least `update_every`.
        rule: a user's own rule, used instead of `config.type`.

    Raises:
        ValueError: A user's rule returns a beta outside [0, 1].
    """
    share = RULES[config.type] if rule is None else partial(_checked_gain, rule)
    if config.update_every == 1:
        return share(t, config)
    total = 0.0
    for s in range(t - config.update_every + 1, t + 1):
        # This computes 1 - prod(1 - share) without a difference of nearly equal numbers.
        total += (1 - total) * share(s, config)
    return total


def _checked_gain(rule: Rule, t: int, config: EMAConfig) -> float:
    beta = float(rule(t, config))
    if not 0 <= beta <= 1:
        raise ValueError(
            f"decay rule {path_of(config.rule) if config.rule else repr(rule)}: expected beta in [0, 1] at t={t},"
            f" got {beta!r}"
        )
    return 1 - beta


def profile(config: EMAConfig, T: int, rule: Rule | None = None) -> list[float]:
    """Return the weights w_0 ... w_T of theta_0 ... theta_T in the average after `update(iteration=T)`; their sum is 1.

    This is the impulse response of the recursion: w_s = gain_s * prod(beta_r for r after s). Up to `start_iter` the
    average is equal to the live weights, so w_T is 1. The first update must be at iteration `start_iter`, and none may
    be skipped.
    """
    weights = [0.0] * (T + 1)
    if config.start_iter >= T:
        weights[T] = 1.0
        return weights
    remaining = 1.0
    k = config.update_every
    for t in range((T - config.start_iter) // k * k, 0, -k):
        share = gain(config, t, rule)
        weights[config.start_iter + t] = remaining * share
        remaining *= 1 - share
    weights[config.start_iter] = remaining
    return weights


def power_exponent(config: EMAConfig) -> float:
    """Return the gamma of the power rule; it follows from `sigma_rel` if that is set."""
    return config.gamma if config.sigma_rel is None else gamma_from_sigma_rel(config.sigma_rel)


def sigma_rel_from_gamma(gamma: float) -> float:
    """Return the standard deviation of the power profile relative to the training length (EDM2, eq. 125)."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


@lru_cache(maxsize=64)  # every update calls it
def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """Invert `sigma_rel_from_gamma`: return the largest root of g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2).

    Raises:
        ValueError: `sigma_rel` is not in (0, 1/sqrt(12)).
    """
    if not 0 < sigma_rel < MAX_SIGMA_REL:
        raise ValueError(f"sigma_rel: expected a number in (0, {MAX_SIGMA_REL:.4f}), got {sigma_rel!r}")
    if sigma_rel < 1e-16:  # its square would be lost; the root is this in float64
        return min(1 / sigma_rel, sys.float_info.max)
    inverse_square = sigma_rel**-2
    # 1/sigma_rel is above the largest root, and there the cubic is convex: Newton's method converges from above.
    gamma = 1 / sigma_rel
    for _ in range(100):
        value = ((gamma + 7) * gamma + 16 - inverse_square) * gamma + 12 - inverse_square
        step = value / ((3 * gamma + 14) * gamma + 16 - inverse_square)
        gamma -= step
        if abs(step) <= 1e-15 * max(gamma, 1.0):
            break
    return max(gamma, 0.0)
