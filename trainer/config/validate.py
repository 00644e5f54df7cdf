"""Checks of a configuration beyond types: ranges, names, and divisibility by the number of processes. No torch."""

import inspect
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any

from ema.config import EMAConfig
from ema.rules import STEERED
from trainer import schedules
from trainer.config.averages import key_of, settle_averages
from trainer.config.eval_sets import further_sets
from trainer.config.on_checkpoint import is_command
from trainer.config.parameter_groups import settle_groups
from trainer.config.renames import parse_renames
from trainer.config.schema import (
    AUTO,
    PRECISIONS,
    SHADOW_PRECISIONS,
    STRATEGIES,
    Config,
    LoggerConfig,
    TrainerConfig,
)
from trainer.errors import ConfigError

RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda v: 0 <= v < 2**63, "a whole number of at least 0"),
    "experiment": (lambda v: bool(re.fullmatch(r"[\w.-]+", v)), "letters, digits, _, - and ."),
    "init_from": (lambda v: v != "", "a file, a folder or a run directory"),
    "fork": (lambda v: v != "", "RUN_DIR[@STEP]"),
    "trainer.steps": (lambda v: v >= 1, "at least 1"),
    "trainer.global_batch_size": (lambda v: 1 <= v <= 2**24, "1 to 16777216"),
    "trainer.accumulate": (lambda v: v >= 1, "at least 1"),
    "trainer.max_grad_norm": (lambda v: v >= 0, "at least 0"),
    "trainer.log_every": (lambda v: v >= 1, "at least 1"),
    "trainer.eval_every": (lambda v: v >= 1, "at least 1"),
    "trainer.eval_samples": (
        lambda v: v == AUTO or bool(re.fullmatch(r"[0-9]{1,18}", str(v))),
        "at least 0, or auto",
    ),
    "trainer.eval_batch_size": (lambda v: v >= 1, "at least 1"),
    "trainer.save_every": (
        lambda v: bool(re.fullmatch(r"[0-9]{1,18}", str(v)) or (TrainerConfig(save_every=v).save_s or 0) > 0),
        "a number of steps of at least 0 or a duration such as 30s, 10min or 2h",
    ),
    "trainer.on_checkpoint": (
        lambda v: v is None or is_command(v),
        "a command line whose only fields are {path}, {step} and {run_dir}",
    ),
    "trainer.keep_checkpoints": (lambda v: v >= 1, "at least 1"),
    "trainer.num_workers": (lambda v: 0 <= v <= 256, "0 to 256"),
    "trainer.num_threads": (lambda v: 0 <= v <= 1024, "0 to 1024"),
    "trainer.timeout_s": (lambda v: 0 < v < math.inf, "a number of seconds above 0"),
    "sharding.replicate": (lambda v: v >= 1, "at least 1"),
    "ema.batch_size": (lambda v: v >= 0, "at least 0"),
    "ema.batchnorm_batches": (lambda v: v >= 0, "at least 0"),
    "ema.axis": (lambda v: v == 0 or 3 <= v <= 64, "0, or 3 to 64"),
    "ema.snapshots": (lambda v: 0 <= v <= 10_000, "0 to 10000"),
    "sharding._target_": (lambda v: v != "", "the dotted path of a function"),
    "optimizer._target_": (lambda v: v != "", "the dotted path of a class or a function"),
    "optimizer.name": (bool, "a class name of torch.optim"),
    "schedule._target_": (lambda v: v != "", "the dotted path of a function"),
    "logger._target_": (lambda v: v != "", "the dotted path of a class"),
    "optimizer.lr": (lambda v: 0 <= v < math.inf, "a number of at least 0"),
    "schedule.warmup_steps": (lambda v: v >= 0, "at least 0"),
    "schedule.decay_fraction": (lambda v: 0 < v <= 1, "a number in (0, 1]"),
    "schedule.min_ratio": (lambda v: 0 <= v <= 1, "a number in [0, 1]"),
}
"""Condition on the value of each key, and its description for messages."""

LONGEST_GROUP = 128
"""Longest name of a group at wandb, in characters."""

LOGGERS = ("wandb", "tensorboard", "csv", "trackio", "none")
CHOICES: dict[str, Sequence[str | None]] = {
    "trainer.non_finite": ("skip", "stop"),
    "trainer.eval_policy": ("full", "race"),
    "trainer.device": ("auto", "cpu", "cuda"),
    "sharding.strategy": tuple(STRATEGIES),
    "sharding.param_dtype": (*PRECISIONS, None),
    "sharding.reduce_dtype": (*PRECISIONS, None),
    "ema.dtype": (*SHADOW_PRECISIONS, None),
    "ema.snapshot_dtype": ("float32", "bfloat16"),
    "ema.snapshot_spacing": ("uniform", "geometric", "both"),
    "ema.mode": ("auto", "full_tensor", "local_shard"),
    "schedule.name": ("constant", "cosine", "wsd", "inverse_sqrt"),
    "logger.name": LOGGERS,
    "logger.mode": ("offline", "online"),
}
"""Allowed values of each key; None means null."""

WANDB: dict[str, tuple[Callable[[Any], bool], str]] = {
    "project": (
        lambda v: 1 <= len(v) <= 128 and not re.search(r"[/\\#?%:\x00-\x1f\x7f]", v),
        r"1 to 128 characters without / \ # ? % : and line breaks",
    ),
    "entity": (lambda v: v is None or bool(re.fullmatch(r"[\w.-]{1,128}", v)), "letters, digits, _, - and ."),
    "group": (lambda v: v is None or len(v) <= LONGEST_GROUP, f"at most {LONGEST_GROUP} characters"),
    "tags": (lambda v: all(1 <= len(tag) <= 64 for tag in v), "tags of 1 to 64 characters"),
}
"""Condition of wandb on each key of `logger`, and its description for messages; in mode `offline` wandb checks the
group and the entity only when the run is uploaded."""


def validate(config: Config, world_size: int) -> dict[str, EMAConfig]:
    """Refuse a configuration that cannot run; return the settings of its averages by name (`settle_averages`).

    Args:
        config: configuration whose types are checked already.
        world_size: number of processes of the run.

    Raises:
        ConfigError: A value is not allowed; one line with the key, the expected and the received value.
    """
    validate_evaluation(config, world_size)
    if config.sharding.scales_loss and config.trainer.non_finite == "stop":
        raise ConfigError(
            "trainer.non_finite: expected skip with float16, because the scale of the loss is found by steps that"
            " overflow, got 'stop'"
        )
    _check_loggers(config.logger)
    _check_init(config)
    settle_groups(config.optimizer)
    if config.sharding._target_ is None:  # otherwise the user's function decides how batches are split
        check_batch_size(config, world_size)
        if config.sharding.strategy == "none" and world_size > 1:
            raise ConfigError(
                f"sharding.strategy: 'none' is for one process and this run has {world_size};"
                " choose sharding=ddp, sharding=fsdp or sharding=hsdp"
            )
    averages = settle_averages(config)
    if config.trainer.eval_samples == AUTO and not averages:
        raise ConfigError(f"trainer.eval_samples: expected a number in a run without averages, got {AUTO!r}")
    if config.sharding.shards:
        key = "strategy" if config.sharding._target_ is None else "_target_"
        for name, average in averages.items():
            if not average.fsdp2:
                raise ConfigError(
                    f"{key_of(config, name, 'fsdp2')}: false does not allow a sharded model, and sharding.{key} is"
                    f" {getattr(config.sharding, key)!r}"
                )
    return averages


def reject_unused_overrides(config: Config, overrides: Sequence[str]) -> None:
    """Refuse typed overrides of names, `schedule` and `ema` without effect in this run: they show a user's mistake.

    Raises:
        ConfigError: An override has no effect; names the key.
    """
    typed = {override.lstrip("+").partition("=")[0]: override.partition("=")[2] for override in overrides}
    for group in ("optimizer", "schedule", "logger"):
        target = getattr(config, group)._target_
        if f"{group}.name" in typed and target is not None:
            raise ConfigError(f"{group}.name: {group}._target_={target} replaces it; set only one of the two")
    if config.schedule._target_ is None:
        for field in ("decay_fraction", "min_ratio"):
            if f"schedule.{field}" in typed and field not in settings_read(config.schedule.name):
                raise ConfigError(f"schedule.{field}: the schedule {config.schedule.name} does not read it")
    for key, value in typed.items():
        clears = key == "ema.enabled" or value in ("[]", "null", "")
        if not config.ema.enabled and key.startswith("ema.") and not clears:
            raise ConfigError(f"{key}: the run keeps no average (ema=off, ema.enabled=false)")
    if "ema.decay" in typed and config.ema.decays and not config.ema.averages:
        raise ConfigError("ema.decay: ema.decays sets the decays of this run; set only one of the two")
    if "ema.gamma" in typed and config.ema.sigma_rel is not None and not config.ema.averages:
        raise ConfigError("ema.gamma: ema.sigma_rel overrides it; set only one of the two")
    _reject_unused_fields(config, typed)
    if config.ema.rule is not None:
        return
    averages = (config.ema.averages or {"": {}}).values()
    for field, rules in STEERED.items():
        # An entry of ema.averages reads a field of the group unless it sets that field itself.
        types = {
            own.get("type", config.ema.type) for own in averages if field not in own and "rule" not in own
        }
        if f"ema.{field}" in typed and not types & {*rules}:
            actual = ", ".join(sorted(types)) or "set by each average"
            raise ConfigError(
                f"ema.{field}: read by ema.type {' and '.join(rules)} only, and ema.type is {actual}"
            )


def _reject_unused_fields(config: Config, typed: Collection[str]) -> None:
    """Refuse a field of a typed entry of `ema.averages` that the rule of this average does not read."""
    for name, own in (config.ema.averages or {}).items():
        kind, entry = own.get("type", config.ema.type), f"ema.averages.{name}"
        is_typed = any(key in ("ema.averages", entry) or key.startswith(f"{entry}.") for key in typed)
        if not is_typed or own.get("rule", config.ema.rule) is not None:
            continue
        for field, rules in STEERED.items():
            if own.get(field) is not None and kind not in rules:
                raise ConfigError(
                    f"{entry}.{field}: read by ema.type {' and '.join(rules)} only, and the type of this"
                    f" average is {kind}"
                )


def settings_read(schedule: str) -> Collection[str]:
    """Return the keys of the group `schedule` that the built-in schedule of this name reads."""
    return inspect.signature(getattr(schedules, schedule)).parameters.keys()


def validate_evaluation(config: Config, world_size: int) -> None:
    """Refuse a configuration that cannot evaluate weights; arguments and errors as for `validate`.

    An evaluation reduces no gradients. So every process may hold the whole model, and no batch needs equal parts.
    """
    for key, (good, expected) in RANGES.items():
        value = attrgetter(key)(config)
        if not good(value):
            raise ConfigError(f"{key}: expected {expected}, got {value!r}")
    for key, names in CHOICES.items():
        value = attrgetter(key)(config)
        if value not in names:
            shown = ", ".join("null" if name is None else name for name in names)
            raise ConfigError(f"{key}: expected one of {shown}, got {value!r}")
    further_sets(config.data)
    strategy, replicate = config.sharding.strategy, config.sharding.replicate
    if config.sharding._target_ is not None:  # the user's function gives both fields their meaning
        return
    if strategy == "hsdp" and world_size % replicate:
        raise ConfigError(
            f"sharding.replicate: expected a divisor of the {world_size} processes of this run, got {replicate}"
        )
    if strategy != "hsdp" and replicate != 1:
        raise ConfigError(f"sharding.replicate: only hsdp has replicas and sharding.strategy is {strategy!r}")


def _check_init(config: Config) -> None:
    if config.fork is not None and config.init_from is not None:
        raise ConfigError("fork: begins with the weights of the other run; remove init_from")
    parse_renames(config.init.rename)
    typed = [field.name for field in fields(config.init) if getattr(config.init, field.name)]
    if typed and config.init_from is None:
        raise ConfigError(f"init.{typed[0]}: read only with init_from=SOURCE, and the run has none")


def _check_loggers(logger: LoggerConfig) -> None:
    chosen = [logger._target_ or logger.name, *logger.also]
    for position, name in enumerate(logger.also, start=1):
        if name in chosen[:position]:
            raise ConfigError(f"logger.also: expected each logger once, got {name!r} twice")
        if name not in LOGGERS[:-1] and "." not in name:
            raise ConfigError(
                f"logger.also: expected {', '.join(LOGGERS[:-1])} or the dotted path of a class, got {name!r}"
            )
    if "wandb" not in chosen:
        return
    for key, (good, expected) in WANDB.items():
        value = getattr(logger, key)
        if not good(value):
            raise ConfigError(f"logger.{key}: expected {expected}, as wandb does, got {value!r}")


def check_batch_size(config: Config, parts: int) -> None:
    """Refuse a global batch that does not split evenly over processes and micro-batches.

    `parts` is the number of processes, or of groups of processes that share their samples.

    Raises:
        ConfigError: The batch does not split evenly; the message suggests a size.
    """
    batch, accumulate = config.trainer.global_batch_size, config.trainer.accumulate
    if batch % (parts * accumulate):
        unit = parts * accumulate
        below, above = batch // unit * unit, (batch // unit + 1) * unit
        what = "processes" if config.sharding._target_ is None else "ranks of the data mesh"
        raise ConfigError(
            f"trainer.global_batch_size: expected a multiple of {unit} ({parts} {what} x"
            f" trainer.accumulate={accumulate}), such as {below or above}, got {batch}"
        )
