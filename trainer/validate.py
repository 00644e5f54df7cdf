"""What types cannot refuse: ranges, names, and what the number of processes must divide. Imports no torch.

Also here: which averages a run keeps and what each is called (`ema_configs`), and what will be true of them that
the user may not expect (`ema_warnings`).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from ema.config import EMAConfig
from trainer.config import PRECISIONS, Config, ConfigError

STRATEGIES = ("none", "ddp", "fsdp", "hsdp")
SHARDING_STRATEGIES = ("fsdp", "hsdp")
BANK_RULES = ("constant", "warmup", "debiased")
"""Decay rules that `decay` steers, so that several decays make several averages."""

RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda v: 0 <= v < 2**63, "a whole number of at least 0"),
    "experiment": (lambda v: bool(re.fullmatch(r"[\w.-]+", v)), "letters, digits, _, - and ."),
    "trainer.steps": (lambda v: v >= 1, "at least 1"),
    "trainer.global_batch_size": (lambda v: v >= 1, "at least 1"),
    "trainer.accumulate": (lambda v: v >= 1, "at least 1"),
    "trainer.max_grad_norm": (lambda v: v >= 0, "at least 0"),
    "trainer.log_every": (lambda v: v >= 1, "at least 1"),
    "trainer.eval_every": (lambda v: v >= 1, "at least 1"),
    "trainer.eval_samples": (lambda v: v >= 0, "at least 0"),
    "trainer.eval_batch_size": (lambda v: v >= 1, "at least 1"),
    "trainer.save_every": (lambda v: v >= 0, "at least 0"),
    "trainer.keep_checkpoints": (lambda v: v >= 1, "at least 1"),
    "trainer.num_workers": (lambda v: v >= 0, "at least 0"),
    "trainer.num_threads": (lambda v: v >= 0, "at least 0"),
    "trainer.timeout_s": (lambda v: 0 < v < math.inf, "a number of seconds above 0"),
    "sharding.replicate": (lambda v: v >= 1, "at least 1"),
    "ema.batch_size": (lambda v: v >= 0, "at least 0"),
    "ema.batchnorm_batches": (lambda v: v >= 0, "at least 0"),
    "optimizer.lr": (lambda v: 0 <= v < math.inf, "a number of at least 0"),
    "schedule.warmup_steps": (lambda v: v >= 0, "at least 0"),
    "schedule.decay_fraction": (lambda v: 0 < v <= 1, "a number in (0, 1]"),
    "schedule.min_ratio": (lambda v: 0 <= v <= 1, "a number in [0, 1]"),
}
"""Key, what its value must satisfy, and how to say so."""

CHOICES: dict[str, Sequence[str | None]] = {
    "trainer.non_finite": ("skip", "stop"),
    "trainer.device": ("auto", "cpu", "cuda"),
    "sharding.strategy": STRATEGIES,
    "sharding.param_dtype": (*PRECISIONS, None),
    "sharding.reduce_dtype": (*PRECISIONS, None),
    "ema.dtype": (*PRECISIONS, None),
    "ema.mode": ("auto", "full_tensor", "local_shard"),
    "schedule.name": ("constant", "cosine", "wsd"),
    "logger.name": ("wandb", "tensorboard", "none"),
    "logger.mode": ("offline", "online"),
}
"""Key and the names it may hold; None stands for null."""


def validate(config: Config, world_size: int) -> None:
    """Refuse a configuration that cannot run.

    Args:
        config: Of the right types already.
        world_size: Number of processes of the run.

    Raises:
        ConfigError: one line with the key, what was expected and the value received.
    """
    for key, (good, expected) in RANGES.items():
        value = _value(config, key)
        if not good(value):
            raise ConfigError(f"{key}: expected {expected}, got {value!r}")
    for key, names in CHOICES.items():
        value = _value(config, key)
        if value not in names:
            shown = ", ".join("null" if name is None else name for name in names)
            raise ConfigError(f"{key}: expected one of {shown}, got {value!r}")
    _check_processes(config, world_size)
    ema_configs(config)


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _check_processes(config: Config, world_size: int) -> None:
    batch, accumulate = config.trainer.global_batch_size, config.trainer.accumulate
    if batch % (world_size * accumulate):
        unit = world_size * accumulate
        below, above = batch // unit * unit, (batch // unit + 1) * unit
        raise ConfigError(
            f"trainer.global_batch_size: expected a multiple of {unit} ({world_size} processes x"
            f" trainer.accumulate={accumulate}), such as {below or above}, got {batch}"
        )
    strategy, replicate = config.sharding.strategy, config.sharding.replicate
    if strategy == "none" and world_size > 1:
        raise ConfigError(
            f"sharding.strategy: 'none' is for one process and this run has {world_size};"
            " choose sharding=ddp, sharding=fsdp or sharding=hsdp"
        )
    if strategy == "hsdp" and world_size % replicate:
        raise ConfigError(
            f"sharding.replicate: expected a divisor of the {world_size} processes of this run, got {replicate}"
        )
    if strategy != "hsdp" and replicate != 1:
        raise ConfigError(f"sharding.replicate: only hsdp has replicas and sharding.strategy is {strategy!r}")
    if strategy in SHARDING_STRATEGIES and config.ema.enabled and not config.ema.fsdp2:
        raise ConfigError(f"ema.fsdp2: false refuses sharded models and sharding.strategy is {strategy!r}")


def ema_configs(config: Config) -> dict[str, EMAConfig]:
    """The averages of a run by name, in the order of `ema.decays`; empty under `ema=off`.

    `mode=auto` and `batch_size=0` are settled here. Names, as they appear in `eval/ema/<name>/loss`:

    * constant: the decay, `0.999`
    * warm-up and debiased: `warmup_0.999`, `debiased_0.999`
    * power: the exponent, `power_16.97`; where `sigma_rel` is set, the width, `power_sigma0.05`
    * half-life: thousands of samples, `halflife_500kimg`
    * a user's own rule: the function's name, and `_0.999` after it in a bank.

    Raises:
        ConfigError: naming the field of `ema` that is out of range, or two decays that are the same.
    """
    group = config.ema
    if not group.enabled:
        return {}
    if group.decays and group.rule is None and group.type not in BANK_RULES:
        raise ConfigError(
            f"ema.decays: expected ema.type to be one of {', '.join(BANK_RULES)}, got {group.type!r}"
        )
    settled = {field.name: getattr(group, field.name) for field in dataclasses.fields(EMAConfig)}
    settled["dtype"] = PRECISIONS.get(group.dtype, group.dtype) if group.dtype else group.dtype
    settled["batch_size"] = group.batch_size or config.trainer.global_batch_size
    if group.mode == "auto":
        sharded = config.sharding.strategy in SHARDING_STRATEGIES
        settled["mode"] = "local_shard" if sharded else "full_tensor"
    configs: dict[str, EMAConfig] = {}
    for position, decay in enumerate(group.decays or [group.decay]):
        key = f"ema.decays[{position}]" if group.decays else "ema.decay"
        average = EMAConfig(**{**settled, "decay": decay})
        try:
            average.validate()
        except ValueError as error:
            field, _, message = str(error).removeprefix("EMAConfig.").partition(":")
            raise ConfigError(f"{key if field == 'decay' else f'ema.{field}'}:{message}") from error
        name = _name(average, in_bank=bool(group.decays))
        if name in configs:
            raise ConfigError(f"{key}: expected decays that differ, got {decay!r} twice")
        configs[name] = average
    return configs


def _name(average: EMAConfig, in_bank: bool) -> str:
    if average.rule is not None:
        return average.rule.rpartition(".")[2] + (f"_{average.decay!r}" if in_bank else "")
    match average.type:
        case "constant":
            return repr(average.decay)
        case "power":
            sigma = average.sigma_rel
            return f"power_{average.gamma:g}" if sigma is None else f"power_sigma{sigma:g}"
        case "halflife":
            return f"halflife_{average.halflife_kimg:g}kimg"
        case rule:
            return f"{rule}_{average.decay!r}"


LARGEST_MOVING_DECAY = {"bfloat16": 0.99, "float16": 0.999, "float32": 0.99999}
"""Decays beyond which an update of a shadow in this dtype is mostly rounded away (8, 11 and 24 significant bits)."""


def ema_warnings(config: Config) -> list[str]:
    """What holds for these averages on a run of this length and is easy to miss; one line each, key first."""
    warnings: list[str] = []
    seen = config.trainer.steps - config.ema.start_iter
    averages = ema_configs(config)
    if averages and seen <= 0:
        return [
            f"ema.start_iter: {config.ema.start_iter} is not before the last of trainer.steps={config.trainer.steps},"
            " so every average is the live weights"
        ]
    for name, average in averages.items():
        horizon = math.inf if average.decay == 1 else 1 / (1 - average.decay)
        if average.rule is None and average.type in ("constant", "debiased") and horizon > seen:
            first = average.decay**seen if average.type == "constant" else 0.0
            kept = f"; {first:.0%} of it is still the first weights" if first else ""
            warnings.append(f"ema {name}: remembers {horizon:.0f} steps and sees {seen}{kept}")
        floor = LARGEST_MOVING_DECAY.get(average.dtype or "")
        decay = _last_decay(average, seen) ** average.update_every
        if floor is not None and decay > floor:
            more = "" if average.dtype == "float32" else "; ema.dtype=float32 keeps what it learns"
            warnings.append(
                f"ema {name}: decay reaches {decay:.6g} and a {average.dtype} shadow hardly moves above {floor}{more}"
            )
    return warnings + _same_under_warmup(averages, seen)


def _last_decay(average: EMAConfig, seen: int) -> float:
    """The largest decay per step that a built-in rule reaches in `seen` steps; 0 for a user's own."""
    if average.rule is not None:
        return 0.0
    match average.type:
        case "power":
            # gamma + 1 is 1 / sigma_rel - 2 within 15 % for every width below 0.25, enough for a warning
            exponent = average.gamma + 1 if average.sigma_rel is None else max(1.0, 1 / average.sigma_rel - 2)
            return (1 - 1 / seen) ** exponent
        case "halflife":
            samples = average.halflife_kimg * 1000
            if average.rampup_ratio is not None:
                samples = min(samples, average.rampup_ratio * seen * average.batch_size)
            return 0.5 ** (average.batch_size / samples)
        case "warmup":
            return min(average.decay, (1 + seen) / (10 + seen))
        case _:
            return average.decay


def _same_under_warmup(averages: dict[str, EMAConfig], seen: int) -> list[str]:
    """Under min(decay, (1 + t) / (10 + t)) a decay is in force from step (10 decay - 1) / (1 - decay) on."""
    late = {
        name: math.inf if a.decay == 1 else (10 * a.decay - 1) / (1 - a.decay)
        for name, a in averages.items()
        if a.type == "warmup" and a.rule is None
    }
    late = {name: first for name, first in late.items() if first >= seen}
    if not late:
        return []
    names, first = ", ".join(late), min(late.values())
    if len(late) > 1:
        return [
            f"ema {names}: the same average all along: under warm-up they differ from step {first:.0f} on"
        ]
    return [
        f"ema {names}: under warm-up this decay is reached at step {first:.0f} and the average sees {seen};"
        " every higher decay gives the same average"
    ]
