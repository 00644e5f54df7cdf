"""What types cannot refuse: ranges, names, and what the number of processes must divide. Imports no torch.

Also here: which averages a run keeps and what each is called (`ema_configs`).
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ema.advice import pitfalls
from ema.config import EMAConfig
from ema.rules import STEERED, Rule, settings_of
from trainer.config.schema import PRECISIONS, SHADOW_PRECISIONS, STRATEGIES, Config
from trainer.errors import ConfigError

BANK_RULES = STEERED["decay"]
"""Decay rules that `decay` steers, so that several decays make several averages."""
AVERAGE_NAME = re.compile(r"(?!live$)[\w.+-]+")
"""Names that may be part of a metric's name and of a file's; `live` are the weights themselves."""

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
"""Key, the condition on its value, and the words that describe the condition."""

CHOICES: dict[str, Sequence[str | None]] = {
    "trainer.non_finite": ("skip", "stop"),
    "trainer.device": ("auto", "cpu", "cuda"),
    "sharding.strategy": tuple(STRATEGIES),
    "sharding.param_dtype": (*PRECISIONS, None),
    "sharding.reduce_dtype": (*PRECISIONS, None),
    "ema.dtype": (*SHADOW_PRECISIONS, None),
    "ema.mode": ("auto", "full_tensor", "local_shard"),
    "schedule.name": ("constant", "cosine", "wsd"),
    "logger.name": ("wandb", "tensorboard", "none"),
    "logger.mode": ("offline", "online"),
}
"""Key and its allowed names; None means null."""


def validate(config: Config, world_size: int) -> None:
    """Refuse a configuration that cannot run.

    Args:
        config: Of the right types already.
        world_size: Number of processes of the run.

    Raises:
        ConfigError: one line with the key, what was expected and the value received.
    """
    validate_evaluation(config, world_size)
    if config.sharding._target_ is None:  # else the function decides which ranks have samples of their own
        _check_processes(config, world_size)
    averages = ema_configs(config)
    if config.sharding.shards:
        key = "strategy" if config.sharding._target_ is None else "_target_"
        for name, average in averages.items():
            if not average.fsdp2:
                raise ConfigError(
                    f"{key_of(config, name, 'fsdp2')}: false refuses sharded models and sharding.{key} is"
                    f" {getattr(config.sharding, key)!r}"
                )


def refuse_ignored(config: Config, overrides: Sequence[str]) -> None:
    """Refuse what was typed of an average and nothing would read: the run would be another one than was meant.

    Args:
        config: of the run.
        overrides: as typed, without what clears banks beside `ema.decay=` (`trainer.config.compose.without_clearing`).

    Raises:
        ConfigError: naming the key.
    """
    typed = {override.lstrip("+").partition("=")[0]: override.partition("=")[2] for override in overrides}
    for key, value in typed.items():
        clears = key == "ema.enabled" or value in ("[]", "null", "")
        if not config.ema.enabled and key.startswith("ema.") and not clears:
            raise ConfigError(f"{key}: the run keeps no average (ema=off, ema.enabled=false)")
    if "ema.decay" in typed and config.ema.decays and not config.ema.averages:
        raise ConfigError("ema.decay: ema.decays names the decays of this run; give one of the two")
    if "ema.gamma" in typed and config.ema.sigma_rel is not None and not config.ema.averages:
        raise ConfigError("ema.gamma: ema.sigma_rel overrides it; give one of the two")
    if config.ema.rule is not None:
        return
    averages = (config.ema.averages or {"": {}}).values()
    for field, rules in STEERED.items():
        # An average of its own reads a field of the group if it sets neither the field nor another type.
        types = {
            own.get("type", config.ema.type) for own in averages if field not in own and "rule" not in own
        }
        if f"ema.{field}" in typed and not types & {*rules}:
            told = ", ".join(sorted(types)) or "set by each average"
            raise ConfigError(f"ema.{field}: read by ema.type {' and '.join(rules)} only, and it is {told}")


def validate_evaluation(config: Config, world_size: int) -> None:
    """Refuse a configuration with which weights cannot be evaluated; arguments and errors as `validate`.

    Nothing is averaged between the processes of an evaluation: any number of them may each hold the whole model, and no
    batch must be cut equally.
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
    strategy, replicate = config.sharding.strategy, config.sharding.replicate
    if config.sharding._target_ is not None:  # the function reads both as it likes
        return
    if strategy == "hsdp" and world_size % replicate:
        raise ConfigError(
            f"sharding.replicate: expected a divisor of the {world_size} processes of this run, got {replicate}"
        )
    if strategy != "hsdp" and replicate != 1:
        raise ConfigError(f"sharding.replicate: only hsdp has replicas and sharding.strategy is {strategy!r}")


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def check_batch_size(config: Config, parts: int) -> None:
    """Refuse a global batch that cannot be cut equally for `parts` processes, or groups of them, and micro-batches.

    Raises:
        ConfigError: naming sizes that can.
    """
    batch, accumulate = config.trainer.global_batch_size, config.trainer.accumulate
    if batch % (parts * accumulate):
        unit = parts * accumulate
        below, above = batch // unit * unit, (batch // unit + 1) * unit
        what = "processes" if config.sharding._target_ is None else "ranks in the mesh of the data"
        raise ConfigError(
            f"trainer.global_batch_size: expected a multiple of {unit} ({parts} {what} x"
            f" trainer.accumulate={accumulate}), such as {below or above}, got {batch}"
        )


def _check_processes(config: Config, world_size: int) -> None:
    check_batch_size(config, world_size)
    if config.sharding.strategy == "none" and world_size > 1:
        raise ConfigError(
            f"sharding.strategy: 'none' is for one process and this run has {world_size};"
            " choose sharding=ddp, sharding=fsdp or sharding=hsdp"
        )


def ema_configs(config: Config) -> dict[str, EMAConfig]:
    """The averages of a run by name, in the order of `ema.decays` or `ema.averages`; empty under `ema=off`.

    `mode=auto` and `batch_size=0` are settled here. Names, as they appear in `eval/ema/<name>/loss`:

    * constant: the decay, `0.999`
    * warm-up and debiased: `warmup_0.999`, `debiased_0.999`
    * power: the exponent, `power_16.97`; where `sigma_rel` is set, the width, `power_sigma0.05`
    * half-life: thousands of samples, `halflife_500kimg`; as a share of the training, `fraction_0.05`
    * any other rule: its name and its settings
    * a user's own rule: the function's name, and `_0.999` after it in a bank
    * in `ema.averages`: what the user calls it there.

    Raises:
        ConfigError: naming the field of `ema` that is unknown or out of range, or two decays that are the same.
    """
    group = config.ema
    if not group.enabled:
        return {}
    if group.averages:
        return _named_averages(config, group.averages)
    if group.decays and group.rule is None and group.type not in BANK_RULES:
        raise ConfigError(
            f"ema.decays: expected ema.type to be one of {', '.join(BANK_RULES)}, got {group.type!r}"
        )
    configs: dict[str, EMAConfig] = {}
    for position, decay in enumerate(group.decays or [group.decay]):
        key = f"ema.decays[{position}]" if group.decays else "ema.decay"
        average = _average(config, {"decay": decay}, {"decay": key})
        name = _name(average, in_bank=bool(group.decays))
        if name in configs:
            raise ConfigError(f"{key}: expected decays that differ, got {decay!r} twice")
        configs[name] = average
    return configs


def _named_averages(config: Config, averages: Mapping[str, Any]) -> dict[str, EMAConfig]:
    if config.ema.decays:
        raise ConfigError(
            "ema.averages: not together with ema.decays; clear one of them: ema.decays=[] or ema.averages=null"
        )
    configs: dict[str, EMAConfig] = {}
    for name, fields in averages.items():
        if not AVERAGE_NAME.fullmatch(name):
            raise ConfigError(
                f"ema.averages: expected names of letters, digits, _, ., + and - (and not 'live'), got {name!r}"
            )
        if not isinstance(fields, Mapping):
            raise ConfigError(
                f"ema.averages.{name}: expected fields of an average, as in {{decay: 0.999}}, got {fields!r}"
            )
        known = [field.name for field in dataclasses.fields(EMAConfig)]
        for field in fields:
            if field not in known:
                near = difflib.get_close_matches(str(field), known, n=1)
                hint = f"; did you mean ema.averages.{name}.{near[0]}?" if near else ""
                raise ConfigError(f"ema.averages.{name}.{field}: unknown key{hint}")
        configs[name] = _average(config, fields, {field: key_of(config, name, field) for field in fields})
    return configs


def key_of(config: Config, name: str, field: str) -> str:
    """Where the user sets this field of this average."""
    own = (config.ema.averages or {}).get(name, {})
    return f"ema.averages.{name}.{field}" if field in own else f"ema.{field}"


def _average(config: Config, own: Mapping[str, Any], keys: Mapping[str, str]) -> EMAConfig:
    """One average: what it sets itself, the group's values for the rest, and what is left to the run settled.

    Args:
        config: the run.
        own: fields in which the average differs from the group, of any type.
        keys: the user's key of each of these fields.

    Raises:
        ConfigError: naming the key whose value is impossible.
    """
    shared = {field.name: getattr(config.ema, field.name) for field in dataclasses.fields(EMAConfig)}
    settled = {**shared, **own}
    if isinstance(settled["dtype"], str):
        settled["dtype"] = SHADOW_PRECISIONS.get(settled["dtype"], settled["dtype"])
    if type(settled["batch_size"]) is int:
        settled["batch_size"] = settled["batch_size"] or config.trainer.global_batch_size
    if settled["mode"] == "auto":
        settled["mode"] = "local_shard" if config.sharding.shards else "full_tensor"
    average = EMAConfig(**settled)
    try:
        average.validate()
    except ValueError as error:
        field, _, message = str(error).removeprefix("EMAConfig.").partition(":")
        raise ConfigError(f"{keys.get(field, f'ema.{field}')}:{message}") from error
    return average


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
            values = {field: getattr(average, field) for field in settings_of(rule)}
            # A decay may need all its digits.
            shown = (
                f"{value:g}" if isinstance(value, float) and field != "decay" else repr(value)
                for field, value in values.items()
                if value is not None
            )
            return "_".join([rule, *shown])


def ema_warnings(
    config: Config, rules: Mapping[str, Rule] | None = None, live_dtype: str | None = None
) -> list[str]:
    """`ema.advice` of the run's averages; `rules` are the callables behind `ema.rule` by name of the average."""
    return pitfalls(ema_configs(config), config.trainer.steps, rules=rules, live_dtype=live_dtype)
