"""The averages of a run: their settings and their names, from the group `ema`. Imports no torch."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from ema.advice import pitfalls
from ema.config import EMAConfig
from ema.rules import STEERED, Rule, path_of, settings_of
from trainer.config.fields import check_fields
from trainer.config.schema import SHADOW_PRECISIONS, Config
from trainer.errors import ConfigError, blamed_on

INITIAL = "initial"
"""Name of the average of a bank with `ema.axis` that keeps the initial weights; its decay is 1."""
HORIZON = "horizon_"
"""Beginning of the names of the other averages of such a bank, before the horizon."""
LONGEST = 0.25
"""Longest horizon of such a bank, as a share of the steps of the run, before it is rounded to a power of 2."""
SETTLES = 3
"""Horizons for which an average that is added to such a bank must go on until it counts: then 5 % of it are the live
weights with which it began, whose noise is that of a single step."""
BANK_RULES = STEERED["decay"]
"""Rules that have a `decay`; only these may be combined with `ema.decays`."""
AVERAGE_NAME = re.compile(r"(?!live$)[\w.+-]+")
"""Allowed names of averages: they are part of metric names and file names. `live` means the live weights."""


def settle_averages(config: Config) -> dict[str, EMAConfig]:
    """Return the settings of each average by name, in the order of `ema.decays` or `ema.averages`.

    The result is empty under `ema=off`. `mode=auto`, `batch_size=0`, `num_iterations=0` and a share as
    `start_iter` are replaced by their values. The names appear in metrics, as in `eval/ema/<name>/loss`:

    * constant: the decay, `0.999`
    * warm-up, debiased and cosine: `warmup_0.999`, `debiased_0.999`, `cosine_0.996`
    * power: the exponent, `power_16.97`; the width if `sigma_rel` is set, `power_sigma0.05`
    * half-life: thousands of samples, `halflife_500kimg`; as a share of the training, `fraction_0.05`
    * any other rule: the rule's name and its settings
    * a user's own rule: the function's name, followed by `_0.999` in a bank
    * under `ema.axis`: the horizon, `horizon_512`; and `initial` for the initial weights
    * in `ema.averages`: the name that the user gives there

    Raises:
        ConfigError: A field of `ema` is unknown or out of range, or two decays are the same; names the key.
    """
    group = config.ema
    if not group.enabled:
        return {}
    if group.axis:
        return _averages_of_axis(config)
    if group.axis_grows:
        raise ConfigError("ema.axis_grows: expected false without ema.axis, whose bank grows, got true")
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


def without_initial(config: Config, averages: Mapping[str, EMAConfig]) -> dict[str, EMAConfig]:
    """Return those of a run's averages that are compared: all but the initial weights of `ema.axis`."""
    return {name: own for name, own in averages.items() if not (config.ema.axis and name == INITIAL)}


def axis_horizons(steps: int, count: int, *, grows: bool = False) -> list[int]:
    """Return the horizons of a bank with `ema.axis` at its start: rising powers of 2, at least three.

    Args:
        steps: optimizer steps of the run.
        count: most horizons, at least 3; the longest ones are taken.
        grows: whether the shortest ones are taken in place of the longest.
    """
    last = max(3, round(math.log2(LONGEST * steps)))
    powers = range(1, min(count, last) + 1) if grows else range(max(1, last - count + 1), last + 1)
    return [2**power for power in powers]


def grown_averages(config: Config) -> dict[str, EMAConfig]:
    """Return the averages that a run with `ema.axis_grows` may add to its bank, by name, the shortest first.

    An average of horizon H begins once one of H / 2 has forgotten the initial weights, after at least H steps, and only
    if `SETTLES` H are left. So H is at most a quarter of the steps.
    """
    group, steps = config.ema, config.trainer.steps
    if not (group.enabled and group.axis and group.axis_grows):
        return {}
    horizon = 2 * axis_horizons(steps, group.axis, grows=True)[-1]
    configs: dict[str, EMAConfig] = {}
    while (1 + SETTLES) * horizon <= steps:
        configs[axis_name(horizon)] = _of_horizon(config, horizon)
        horizon *= 2
    return configs


def axis_name(horizon: float) -> str:
    """Return the name of the average of a whole horizon in a bank with `ema.axis`."""
    return f"{HORIZON}{round(horizon)}"


def _of_horizon(config: Config, horizon: int) -> EMAConfig:
    return _average(config, {"decay": 1 - 1 / horizon}, {})


def _averages_of_axis(config: Config) -> dict[str, EMAConfig]:
    group = config.ema
    for key, value, neutral in (
        ("decays", group.decays, "[]"),
        ("averages", group.averages, "null"),
        ("rule", group.rule, "null"),
        ("reference_batch_size", group.reference_batch_size, "null"),
    ):
        if value:
            raise ConfigError(
                f"ema.{key}: cannot be combined with ema.axis, which sets all averages; clear one:"
                f" ema.{key}={neutral} or ema.axis=0"
            )
    if group.type != "constant":
        raise ConfigError(f"ema.type: expected constant with ema.axis, got {group.type!r}")
    if config.trainer.eval_policy != "full":
        raise ConfigError(
            "trainer.eval_policy: expected full with ema.axis, which needs the values of all averages, got"
            f" {config.trainer.eval_policy!r}"
        )
    if group.axis_grows and group.snapshots:
        raise ConfigError(
            "ema.snapshots: expected 0 with ema.axis_grows, because the disk for snapshots of a bank that grows is not"
            f" known before the first step, got {group.snapshots}"
        )
    horizons = axis_horizons(config.trainer.steps, group.axis, grows=group.axis_grows)
    configs = {axis_name(horizon): _of_horizon(config, horizon) for horizon in horizons}
    return configs | {INITIAL: _average(config, {"decay": 1.0}, {})}


def _named_averages(config: Config, averages: Mapping[str, Any]) -> dict[str, EMAConfig]:
    if config.ema.decays:
        raise ConfigError(
            "ema.averages: cannot be combined with ema.decays; clear one: ema.decays=[] or ema.averages=null"
        )
    configs: dict[str, EMAConfig] = {}
    for name, fields in averages.items():
        if not AVERAGE_NAME.fullmatch(name):
            raise ConfigError(
                f"ema.averages: expected names of letters, digits, _, ., + and - (and not 'live'), got {name!r}"
            )
        check_fields(fields, EMAConfig, f"ema.averages.{name}", "fields of an average, as in {decay: 0.999}")
        configs[name] = _average(config, fields, {field: key_of(config, name, field) for field in fields})
    return configs


def pitfalls_of(
    config: Config, averages: Mapping[str, EMAConfig], rules: Mapping[str, Rule], live_dtype: str
) -> list[str]:
    """Return what the user may not expect of the averages (`ema.advice.pitfalls`).

    Args:
        config: validated configuration.
        averages: settings of each average by name.
        rules: the user's own rules by name of the average; they are called for the whole run.
        live_dtype: dtype of the weights, such as `float32`.

    Raises:
        ConfigError: A rule fails or returns no beta; names its key, or of several rules `ema.averages`.
    """
    keys = [key_of(config, name, "rule") for name in rules]
    with blamed_on(keys[0] if len(keys) == 1 else "ema.averages"):
        return pitfalls(
            without_initial(config, averages), config.trainer.steps, rules=rules, live_dtype=live_dtype
        )


def key_of(config: Config, name: str, field: str) -> str:
    """Return the config key that sets this field of this average."""
    own = (config.ema.averages or {}).get(name, {})
    return f"ema.averages.{name}.{field}" if field in own else f"ema.{field}"


def _average(config: Config, own: Mapping[str, Any], keys: Mapping[str, str]) -> EMAConfig:
    """Make the settings of one average from its own fields and, for all other fields, the group `ema`.

    Args:
        config: configuration of the run.
        own: fields in which the average differs from the group; types are not checked yet.
        keys: config key of each of these fields, for error messages.

    Raises:
        ConfigError: A value is out of range; names the key.
    """
    shared = {field.name: getattr(config.ema, field.name) for field in dataclasses.fields(EMAConfig)}
    settled = {**shared, **own}
    if isinstance(settled["dtype"], str):
        settled["dtype"] = SHADOW_PRECISIONS.get(settled["dtype"], settled["dtype"])
    if type(settled["batch_size"]) is int:
        settled["batch_size"] = settled["batch_size"] or config.trainer.global_batch_size
    if type(settled["num_iterations"]) is int:
        settled["num_iterations"] = settled["num_iterations"] or config.trainer.steps
    settled["start_iter"] = _start(settled["start_iter"], config, keys.get("start_iter", "ema.start_iter"))
    if settled["mode"] == "auto":
        settled["mode"] = "local_shard" if config.sharding.shards else "full_tensor"
    average = EMAConfig(**settled)
    try:
        average.validate()
    except ValueError as error:
        field, _, message = str(error).removeprefix("EMAConfig.").partition(":")
        raise ConfigError(f"{keys.get(field, f'ema.{field}')}:{message}") from error
    return average


def _start(value: Any, config: Config, key: str) -> Any:
    """Return the step at which an average starts; a share counts in steps of the run."""
    if not isinstance(value, float):
        return value
    if not 0 < value < 1:
        raise ConfigError(
            f"{key}: expected a whole number of at least 0, or a share of trainer.steps in (0, 1), got {value!r}"
        )
    return round(value * config.trainer.steps)


def _name(average: EMAConfig, in_bank: bool) -> str:
    if average.rule is not None:
        return path_of(average.rule).rpartition(".")[2] + (f"_{average.decay!r}" if in_bank else "")
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
            # A decay such as 0.9999995 needs more digits than :g prints.
            shown = (
                f"{value:g}" if isinstance(value, float) and field != "decay" else repr(value)
                for field, value in values.items()
                if value is not None
            )
            return "_".join([rule, *shown])
